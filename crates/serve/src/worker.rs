//! The engine's thread, and the channels to and from it.
//!
//! The thread owns the engine. Requests reach it as commands between two steps; events go back
//! over one channel for each call, which never blocks the engine: a slow reader's events wait
//! in memory, at most one answer's worth. A reader that is gone is noticed before the next step
//! and its requests are cancelled.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;

use bantam_engine::{Engine, Event, LanguageModel, Request, RequestError, RequestId, SubmitError};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc as events, oneshot};

use crate::ServeError;
use crate::config::EngineFactory;
use crate::error::ApiError;

/// An engine over any model.
pub(crate) trait Generator {
    fn submit(&mut self, request: Request) -> Result<RequestId, SubmitError>;
    fn cancel(&mut self, id: RequestId);
    fn step(&mut self, sink: &mut dyn FnMut(RequestId, Event));
    fn is_idle(&self) -> bool;
    /// The log-probability of each option after a prompt.
    fn score(&mut self, prompt: &[u32], options: &[Vec<u32>]) -> Result<Vec<f64>, RequestError>;
    fn info(&self) -> EngineInfo;
    /// Running and waiting requests.
    fn load(&self) -> (usize, usize);
}

impl<M: LanguageModel> Generator for Engine<M> {
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

    fn score(&mut self, prompt: &[u32], options: &[Vec<u32>]) -> Result<Vec<f64>, RequestError> {
        self.score_options(prompt, options, None)
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
}

/// Options to be scored, between two steps.
struct Aside {
    prompt: Vec<u32>,
    options: Vec<Vec<u32>>,
    reply: oneshot::Sender<Result<Vec<f64>, RequestError>>,
    _permit: Arc<OwnedSemaphorePermit>,
}

impl Aside {
    fn answer(self, engine: &mut dyn Generator) {
        // An asker that is gone needs no answer.
        if !self.reply.is_closed() {
            let scores = engine.score(&self.prompt, &self.options);
            let _ = self.reply.send(scores);
        }
    }
}

/// Several answers to one prompt. The index tells them apart.
struct Generate {
    requests: Vec<Request>,
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
}

/// The server's end of an engine's thread.
pub(crate) struct Worker {
    commands: mpsc::Sender<Command>,
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

    /// The log-probability of each option after the prompt.
    pub(crate) async fn score(
        &self,
        prompt: Vec<u32>,
        options: Vec<Vec<u32>>,
        seat: &SharedSeat,
    ) -> Result<Vec<f64>, ApiError> {
        let (reply, answer) = oneshot::channel();
        let aside = Aside {
            prompt,
            options,
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
        seat: Seat,
    ) -> Result<events::UnboundedReceiver<(usize, Event)>, ApiError> {
        let (sender, receiver) = events::unbounded_channel();
        let (accepted, answer) = oneshot::channel();
        let command = Command::Generate(Generate {
            requests,
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
    loop {
        if engine.is_idle() && asides.is_empty() {
            match inbox.recv() {
                Ok(Command::Generate(generate)) => take(&mut *engine, &mut clients, generate),
                Ok(Command::Aside(aside)) => asides.push_back(aside),
                Err(_) => return,
            }
        }
        loop {
            match inbox.try_recv() {
                Ok(Command::Generate(generate)) => take(&mut *engine, &mut clients, generate),
                Ok(Command::Aside(aside)) => asides.push_back(aside),
                Err(mpsc::TryRecvError::Empty) => break,
                Err(mpsc::TryRecvError::Disconnected) => return,
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
            aside.answer(&mut *engine);
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

fn take(engine: &mut dyn Generator, clients: &mut HashMap<RequestId, Client>, generate: Generate) {
    let Generate {
        requests,
        accepted,
        events,
        permit,
    } = generate;
    let permit = Arc::new(permit);
    let mut ids = Vec::with_capacity(requests.len());
    for request in requests {
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
        };
        clients.insert(id, client);
    }
    let _ = accepted.send(Ok(()));
}
