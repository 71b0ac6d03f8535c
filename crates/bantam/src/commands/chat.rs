//! `bantam chat`: a conversation in the terminal, answers as they come; a turn a line when stdin is no terminal.

use std::io::{self, BufRead as _, IsTerminal as _};
use std::sync::atomic::AtomicBool;

use bantam_engine::{Engine, EngineConfig, Event, Finish, Llama, Request, Sampling};
use bantam_kernels::Compute;
use bantam_text::Message;

use super::Context;
use crate::interrupt;
use crate::loader::Loaded;
use crate::printer::Printer;
use crate::progress::Progress;
use crate::settings::ChatSettings;

/// Talks until the input ends.
pub(crate) fn run(context: &Context, settings: &ChatSettings) -> anyhow::Result<()> {
    let printer = &context.printer;
    let (loaded, model) = {
        let _spinner = Progress::spinner(printer, format!("loading {}", settings.model));
        let (cancel, compute) = (AtomicBool::new(false), Compute::new(settings.threads));
        Loaded::open_and_load(
            context,
            &settings.model,
            &cancel,
            &compute,
            settings.weights,
        )?
    };
    let engine = Engine::new(
        model,
        loaded.base.chat.tokenizer().clone(),
        EngineConfig {
            slots: 1,
            ..EngineConfig::default()
        },
    );
    let system = settings.system.or(loaded.system()).map(Message::system);
    let mut talk = Talk {
        printer,
        loaded: &loaded,
        settings,
        engine,
        messages: system.into_iter().collect(),
        n_system: 0,
        max_context: loaded.max_context()?,
        keys: interrupt::Pause::watch()?,
    };
    talk.n_system = talk.messages.len();
    let by_hand = io::stdin().is_terminal();
    if by_hand {
        printer.note(
            "type a message; Ctrl-C stops an answer, `/new` forgets the conversation, Ctrl-D ends",
        );
    }
    let style = printer.err_style();
    loop {
        if by_hand {
            eprint!("{} ", style.cyan(">"));
        }
        let mut line = String::new();
        if io::stdin().lock().read_line(&mut line)? == 0 {
            break;
        }
        match line.trim() {
            "" => {}
            "/new" if by_hand => {
                talk.messages.truncate(talk.n_system);
                printer.note("a new conversation");
            }
            text => talk.turn(text)?,
        }
    }
    if by_hand {
        eprintln!();
    }
    Ok(())
}

/// A conversation and what answers in it.
struct Talk<'a> {
    printer: &'a Printer,
    loaded: &'a Loaded,
    settings: &'a ChatSettings,
    engine: Engine<Llama>,
    messages: Vec<Message>,
    max_context: usize,
    /// The first messages, which `/new` keeps.
    n_system: usize,
    keys: interrupt::Pause,
}

impl Talk<'_> {
    /// One message and the answer to it.
    fn turn(&mut self, text: &str) -> anyhow::Result<()> {
        self.messages.push(Message::user(text));
        let chat = &self.loaded.base.chat;
        let prompt = chat.prompt(&self.messages, &[])?;
        let room = self.max_context.saturating_sub(prompt.len());
        if room == 0 {
            self.messages.pop();
            self.printer
                .warn("the conversation fills the model's context; `/new` forgets it");
            return Ok(());
        }
        let request = Request {
            prompt,
            max_tokens: self.settings.max_tokens.min(room),
            sampling: Sampling {
                temperature: self.settings.temperature as f32,
                top_p: self.settings.top_p as f32,
                seed: self.settings.seed,
                ..Sampling::default()
            },
            end_tokens: chat.end_tokens().to_vec(),
            ..Request::default()
        };
        let id = self.engine.submit(request)?;
        let (mut answer, mut end, mut written) = (String::new(), None, Ok(()));
        let answering = self.keys.answering();
        while !self.engine.is_idle() {
            if answering.stopped() || written.is_err() {
                self.engine.cancel(id);
            }
            self.engine.step(&mut |_, event| match event {
                Event::Token(token) if written.is_ok() => {
                    answer.push_str(&token.text_delta);
                    written = self.printer.piece(&token.text_delta);
                }
                Event::Token(_) => {}
                Event::Done { finish, .. } => end = Some(finish),
            });
        }
        drop(answering);
        written?;
        self.printer.line("")?;
        match end {
            Some(Finish::Error(error)) => return Err(error.into()),
            Some(Finish::Length) if self.settings.max_tokens < room => {
                self.printer.note(format!(
                    "(cut off after {} tokens: `--max-tokens`)",
                    self.settings.max_tokens
                ));
            }
            Some(Finish::Length) => self.printer.note("(the model's context is full)"),
            Some(Finish::Cancelled) => self.printer.note("(stopped)"),
            Some(Finish::Stop) | None => {}
        }
        self.messages.push(Message::assistant(answer));
        Ok(())
    }
}
