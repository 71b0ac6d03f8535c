//! The engine's thread, and the channels to and from it.
//!
//! The thread owns the engine. Requests reach it as commands between two steps; events go back
//! over one channel for each call, which never blocks the engine: a slow reader's events wait
//! in memory, at most one answer's worth. A reader that is gone is noticed before the next step
//! and its requests are cancelled.

use std::any::Any;
use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;

use bantam_engine::{
    AdapterId, Engine, Event, LanguageModel, Request, RequestError, RequestId, SubmitError,
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc as events, oneshot};

use crate::ServeError;
use crate::error::ApiError;
use crate::residents::Resident;
use crate::served::EngineFactory;

/// An engine over any model.
pub(crate) trait Generator {
    fn submit(&mut self, request: Request) -> Result<RequestId, SubmitError>;
    fn cancel(&mut self, id: RequestId);
    fn step(&mut self, sink: &mut dyn FnMut(RequestId, Event));
    fn is_idle(&self) -> bool;
    /// The log-probability of each option after a prompt.
    fn score(
        &mut self,
        prompt: &[u32],
        options: &[Vec<u32>],
        adapter: Option<AdapterId>,
    ) -> Result<Vec<f64>, RequestError>;
    /// Makes an adapter known; `None` if it is none for this model.
    fn load_adapter(&mut self, adapter: Arc<dyn Any + Send + Sync>) -> Option<AdapterId>;
    fn unload_adapter(&mut self, id: AdapterId);
    fn info(&self) -> EngineInfo;
    /// Running and waiting requests.
    fn load(&self) -> (usize, usize);
}

impl<M: LanguageModel> Generator for Engine<M>
where
    M::Adapter: Sized + Send + Sync + 'static,
{
    fn submit(&mut self, request: Request) -> Result<RequestId, SubmitError> {
        Engine::submit(self, request)
    }

    fn cancel(&mut self, id: RequestId) {
        Engine::cancel(self, id);
    }

    fn step(&mut self, sink: &mut dyn FnMut(RequestId, Event)) {
        Engine::step(self, sink);
    }

    fn is_idle(&self) -> bool {
        Engine::is_idle(self)
    }

    fn score(
        &mut self,
        prompt: &[u32],
        options: &[Vec<u32>],
        adapter: Option<AdapterId>,
    ) -> Result<Vec<f64>, RequestError> {
        self.score_options(prompt, options, adapter)
    }

    fn load_adapter(&mut self, adapter: Arc<dyn Any + Send + Sync>) -> Option<AdapterId> {
        let adapter = adapter.downcast::<M::Adapter>().ok()?;
        Some(Engine::load_adapter(self, adapter))
    }

    fn unload_adapter(&mut self, id: AdapterId) {
        Engine::unload_adapter(self, id);
    }

    fn info(&self) -> EngineInfo {
        EngineInfo {
            max_context: self.model().max_context(),
            vocab: self.model().vocab(),
            capacity: self.queue_room(),
        }
    }

    fn load(&self) -> (usize, usize) {
        (self.running(), self.waiting())
    }
}

/// What the door needs to know of an engine.
#[derive(Debug, Clone, Copy)]
pub(crate) struct EngineInfo {
    pub(crate) max_context: usize,
    pub(crate) vocab: usize,
    /// Answers that may be generated or wait at the same time.
    pub(crate) capacity: usize,
}

/// What an engine is doing, for `/health`.
#[derive(Default)]
pub(crate) struct Load {
    pub(crate) running: AtomicUsize,
    pub(crate) waiting: AtomicUsize,
    pub(crate) stopped: AtomicBool,
}

/// What the engine is asked.
enum Command {
    Generate(Generate),
    Aside(Aside),
    /// The adapter of this [`Resident::id`] is no longer used.
    Forget(u64),
}

/// Options to be scored, between two steps.
struct Aside {
    prompt: Vec<u32>,
    options: Vec<Vec<u32>>,
    resident: Option<Arc<Resident>>,
    reply: oneshot::Sender<Result<Vec<f64>, RequestError>>,
    _permit: Arc<OwnedSemaphorePermit>,
}

impl Aside {
    fn answer(self, engine: &mut dyn Generator, adapters: &mut Adapters) {
        // An asker that is gone needs no answer.
        if !self.reply.is_closed() {
            let scores = (adapters.id(engine, self.resident.as_ref()))
                .map_err(RequestError::from)
                .and_then(|adapter| engine.score(&self.prompt, &self.options, adapter));
            let _ = self.reply.send(scores);
        }
    }
}

/// What the engine calls the adapters that it knows, by [`Resident::id`].
#[derive(Default)]
struct Adapters(HashMap<u64, AdapterId>);

impl Adapters {
    /// The engine's name for an adapter, which it is given if it has not met it.
    fn id(
        &mut self,
        engine: &mut dyn Generator,
        resident: Option<&Arc<Resident>>,
    ) -> Result<Option<AdapterId>, SubmitError> {
        let Some(resident) = resident else {
            return Ok(None);
        };
        if let Some(&id) = self.0.get(&resident.id) {
            return Ok(Some(id));
        }
        let id = engine.load_adapter(Arc::clone(&resident.adapter));
        let id = id.ok_or(SubmitError::UnknownAdapter { id: resident.id })?;
        self.0.insert(resident.id, id);
        Ok(Some(id))
    }

    fn forget(&mut self, engine: &mut dyn Generator, resident: u64) {
        if let Some(id) = self.0.remove(&resident) {
            engine.unload_adapter(id);
        }
    }
}

/// Several answers to one prompt. The index tells them apart.
struct Generate {
    requests: Vec<Request>,
    resident: Option<Arc<Resident>>,
    accepted: oneshot::Sender<Result<(), SubmitError>>,
    events: events::UnboundedSender<(usize, Event)>,
    permit: OwnedSemaphorePermit,
}

/// Where a running request's events go.
struct Client {
    choice: usize,
    events: events::UnboundedSender<(usize, Event)>,
    /// Given back when the last answer of the call has ended.
    _permit: Arc<OwnedSemaphorePermit>,
    /// The adapter stays in memory while an answer is made with it.
    _resident: Option<Arc<Resident>>,
}

/// The server's end of an engine's thread.
pub(crate) struct Worker {
    commands: mpsc::Sender<Command>,
    fits: fn(&dyn Any) -> bool,
    room: Arc<Semaphore>,
    pub(crate) info: EngineInfo,
    pub(crate) load: Arc<Load>,
}

/// A place in the queue for the answers of one call.
pub(crate) struct Seat(OwnedSemaphorePermit);

/// The same for several questions one after the other.
pub(crate) struct SharedSeat(Arc<OwnedSemaphorePermit>);

impl Seat {
    pub(crate) fn share(self) -> SharedSeat {
        SharedSeat(Arc::new(self.0))
    }
}

impl Worker {
    /// Starts the thread and waits until the engine is there.
    pub(crate) fn start(
        id: &str,
        factory: EngineFactory,
        fits: fn(&dyn Any) -> bool,
    ) -> Result<(Self, JoinHandle<()>), ServeError> {
        let (commands, inbox) = mpsc::channel();
        let (ready, started) = mpsc::channel();
        let load = Arc::new(Load::default());
        let shared = Arc::clone(&load);
        let thread = std::thread::Builder::new()
            .name("engine".to_string())
            .spawn(move || {
                let _mark = MarkStopped(Arc::clone(&shared));
                match factory() {
                    Ok(engine) => {
                        let _ = ready.send(Ok(engine.info()));
                        work(engine, &inbox, &shared);
                    }
                    Err(error) => {
                        let _ = ready.send(Err(error));
                    }
                }
            })?;
        let load_error = |reason: String| ServeError::Load {
            id: id.to_string(),
            reason,
        };
        let info = match started.recv() {
            Ok(Ok(info)) => info,
            Ok(Err(reason)) => return Err(load_error(reason)),
            Err(_) => return Err(load_error("it panicked".to_string())),
        };
        let room = Arc::new(Semaphore::new(info.capacity));
        Ok((
            Self {
                commands,
                fits,
                room,
                info,
                load,
            },
            thread,
        ))
    }

    /// Takes `n` places in the queue, or says that there are none.
    pub(crate) fn seat(&self, n: usize) -> Result<Seat, ApiError> {
        let n = u32::try_from(n).map_err(|_| ApiError::busy())?;
        let permit = Arc::clone(&self.room).try_acquire_many_owned(n);
        permit.map(Seat).map_err(|_| ApiError::busy())
    }

    /// Would a request find a place?
    pub(crate) fn has_room(&self) -> bool {
        self.room.available_permits() > 0
    }

    /// Whether this is an adapter for this kind of model.
    pub(crate) fn takes(&self, adapter: &dyn Any) -> bool {
        (self.fits)(adapter)
    }

    /// Tells the engine that an adapter is no longer used.
    pub(crate) fn forget(&self, resident: u64) {
        // An engine that has stopped has forgotten everything.
        let _ = self.commands.send(Command::Forget(resident));
    }

    /// The log-probability of each option after the prompt.
    pub(crate) async fn score(
        &self,
        prompt: Vec<u32>,
        options: Vec<Vec<u32>>,
        resident: Option<Arc<Resident>>,
        seat: &SharedSeat,
    ) -> Result<Vec<f64>, ApiError> {
        let (reply, answer) = oneshot::channel();
        let aside = Aside {
            prompt,
            options,
            resident,
            reply,
            _permit: Arc::clone(&seat.0),
        };
        let sent = self.commands.send(Command::Aside(aside));
        sent.map_err(|_| ApiError::stopping())?;
        Ok(answer.await.map_err(|_| ApiError::stopping())??)
    }

    /// Hands requests to the engine and waits until it has taken or refused them, all or none.
    /// Dropping the receiver cancels them.
    pub(crate) async fn submit(
        &self,
        requests: Vec<Request>,
        resident: Option<Arc<Resident>>,
        seat: Seat,
    ) -> Result<events::UnboundedReceiver<(usize, Event)>, ApiError> {
        let (sender, receiver) = events::unbounded_channel();
        let (accepted, answer) = oneshot::channel();
        let command = Command::Generate(Generate {
            requests,
            resident,
            accepted,
            events: sender,
            permit: seat.0,
        });
        self.commands
            .send(command)
            .map_err(|_| ApiError::stopping())?;
        answer.await.map_err(|_| ApiError::stopping())??;
        Ok(receiver)
    }
}

/// Marks the load as stopped when the thread ends, however it does.
struct MarkStopped(Arc<Load>);

impl Drop for MarkStopped {
    fn drop(&mut self) {
        self.0.stopped.store(true, Ordering::Relaxed);
    }
}

/// Runs until the server lets go of its end; what is running then is dropped.
fn work(mut engine: Box<dyn Generator>, inbox: &mpsc::Receiver<Command>, load: &Load) {
    let mut clients: HashMap<RequestId, Client> = HashMap::new();
    let mut asides: VecDeque<Aside> = VecDeque::new();
    let mut adapters = Adapters::default();
    loop {
        let is_idle = engine.is_idle() && asides.is_empty();
        let mut next = if is_idle {
            match inbox.recv() {
                Ok(command) => Some(command),
                Err(_) => return,
            }
        } else {
            None
        };
        loop {
            let command = match next.take().map_or_else(|| inbox.try_recv(), Ok) {
                Ok(command) => command,
                Err(mpsc::TryRecvError::Empty) => break,
                Err(mpsc::TryRecvError::Disconnected) => return,
            };
            match command {
                Command::Generate(generate) => {
                    take(&mut *engine, &mut adapters, &mut clients, generate);
                }
                Command::Aside(aside) => asides.push_back(aside),
                Command::Forget(resident) => adapters.forget(&mut *engine, resident),
            }
        }
        for (&id, _) in clients
            .iter()
            .filter(|(_, client)| client.events.is_closed())
        {
            engine.cancel(id);
        }
        // One between two steps, so that running answers go on.
        if let Some(aside) = asides.pop_front() {
            aside.answer(&mut *engine, &mut adapters);
        }
        engine.step(&mut |id, event| {
            let is_end = matches!(event, Event::Done { .. });
            if let Some(client) = clients.get(&id) {
                // A reader that is gone is seen before the next step.
                let _ = client.events.send((client.choice, event));
            }
            if is_end {
                clients.remove(&id);
            }
        });
        let (running, waiting) = engine.load();
        load.running.store(running, Ordering::Relaxed);
        load.waiting.store(waiting, Ordering::Relaxed);
    }
}

fn take(
    engine: &mut dyn Generator,
    adapters: &mut Adapters,
    clients: &mut HashMap<RequestId, Client>,
    generate: Generate,
) {
    let Generate {
        requests,
        resident,
        accepted,
        events,
        permit,
    } = generate;
    let adapter = match adapters.id(engine, resident.as_ref()) {
        Ok(adapter) => adapter,
        Err(error) => {
            let _ = accepted.send(Err(error));
            return;
        }
    };
    let permit = Arc::new(permit);
    let mut ids = Vec::with_capacity(requests.len());
    for mut request in requests {
        request.adapter = adapter;
        match engine.submit(request) {
            Ok(id) => ids.push(id),
            Err(error) => {
                ids.iter().for_each(|&id| engine.cancel(id));
                let _ = accepted.send(Err(error));
                return;
            }
        }
    }
    for (choice, id) in ids.into_iter().enumerate() {
        let client = Client {
            choice,
            events: events.clone(),
            _permit: Arc::clone(&permit),
            _resident: resident.clone(),
        };
        clients.insert(id, client);
    }
    let _ = accepted.send(Ok(()));
}
