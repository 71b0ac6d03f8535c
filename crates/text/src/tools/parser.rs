//! Calls out of an answer's text, as it comes.
//!
//! Whatever the pieces the text comes in, the parts that come out are the same when joined. Text that may yet
//! become a call is held back; blanks before a call belong to neither.

use super::convention::{CUSTOM_INPUT, CUSTOM_OPEN};
use super::{ToolGrammar, ToolSyntax};

/// What is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CallKind {
    /// A function, with JSON arguments.
    Function,
    /// A custom tool, with text.
    Custom,
}

/// A part of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ToolPiece {
    /// Text outside calls.
    Text(String),
    /// A call begins.
    Begin {
        /// What is called.
        kind: CallKind,
        /// Its name.
        name: String,
    },
    /// More of the present call's arguments or input.
    Input(String),
    /// The present call is complete.
    End,
}

/// Reads one answer.
#[derive(Debug, Clone)]
pub struct ToolParser {
    syntax: ToolSyntax,
    functions: bool,
    customs: bool,
    state: State,
    /// Text that is not decided yet.
    held: String,
    /// Has there been a call?
    called: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Text,
    /// After the trigger, before the arguments.
    Head,
    /// In the arguments: how deep, in a string, after a backslash.
    Arguments {
        depth: usize,
        quoted: bool,
        escaped: bool,
    },
    /// After the arguments.
    Tail,
    /// After [`CUSTOM_OPEN`].
    CustomHead,
    Custom,
}

impl ToolParser {
    /// For an answer that the grammar allows.
    pub fn new(grammar: &ToolGrammar) -> Self {
        Self {
            syntax: grammar.syntax.clone(),
            functions: !grammar.functions.is_empty(),
            customs: !grammar.customs.is_empty(),
            state: State::Text,
            held: String::new(),
            called: false,
        }
    }

    /// Is the answer's text, rather than a call, being read?
    pub fn in_text(&self) -> bool {
        self.state == State::Text && !self.called
    }

    /// Is a call begun that is not complete? A custom call is complete wherever it ends.
    pub fn in_call(&self) -> bool {
        matches!(
            self.state,
            State::Head | State::Arguments { .. } | State::CustomHead
        )
    }

    /// Takes more text.
    pub fn push(&mut self, text: &str) -> Vec<ToolPiece> {
        self.held.push_str(text);
        let mut pieces = Vec::new();
        while self.advance(&mut pieces) {}
        pieces
    }

    /// The answer is over: a custom call is complete, a function's call that is not stays without its
    /// [`ToolPiece::End`].
    pub fn finish(&mut self) -> Vec<ToolPiece> {
        let held = std::mem::take(&mut self.held);
        match self.state {
            State::Text if self.called && held.trim().is_empty() => Vec::new(),
            State::Text if !held.is_empty() => vec![ToolPiece::Text(held)],
            State::Custom => vec![ToolPiece::End],
            _ => Vec::new(),
        }
    }

    /// One step; `false` if more text is needed.
    fn advance(&mut self, pieces: &mut Vec<ToolPiece>) -> bool {
        match self.state {
            State::Text => self.text(pieces),
            State::Head => self.head(pieces),
            State::Arguments { .. } => self.arguments(pieces),
            State::Tail => self.tail(),
            State::CustomHead => self.custom_head(pieces),
            State::Custom => {
                let input = std::mem::take(&mut self.held);
                if !input.is_empty() {
                    pieces.push(ToolPiece::Input(input));
                }
                false
            }
        }
    }

    fn text(&mut self, pieces: &mut Vec<ToolPiece>) -> bool {
        let trigger = self.syntax.trigger();
        let mut openings: Vec<(&str, State)> = Vec::new();
        if self.functions {
            openings.push((trigger, State::Head));
        }
        if self.customs {
            openings.push((CUSTOM_OPEN, State::CustomHead));
        }
        let found = openings
            .iter()
            .filter_map(|(open, state)| {
                self.held.find(open).map(|at| (at, at + open.len(), *state))
            })
            .min_by_key(|(at, ..)| *at);
        if let Some((at, end, state)) = found {
            let text = self.held[..at].trim_end().to_string();
            self.held.drain(..end);
            if !text.is_empty() {
                pieces.push(ToolPiece::Text(text));
            }
            self.state = state;
            return true;
        }
        let keep = openings
            .iter()
            .map(|(open, _)| overlap(&self.held, open))
            .max()
            .unwrap_or(0);
        let sure = self.held[..self.held.len() - keep].trim_end().len();
        if sure > 0 {
            pieces.push(ToolPiece::Text(self.held.drain(..sure).collect()));
        }
        false
    }

    fn head(&mut self, pieces: &mut Vec<ToolPiece>) -> bool {
        let rest = &self.syntax.before_name[self.syntax.trigger().len()..];
        if !self.held.starts_with(rest) {
            if rest.starts_with(&self.held) {
                return false;
            }
            return self.not_a_call(pieces);
        }
        let Some(n) = self.held[rest.len()..].find(&self.syntax.before_arguments) else {
            return false;
        };
        let name = self.held[rest.len()..rest.len() + n].to_string();
        self.held
            .drain(..rest.len() + n + self.syntax.before_arguments.len());
        pieces.push(ToolPiece::Begin {
            kind: CallKind::Function,
            name,
        });
        self.called = true;
        self.state = State::Arguments {
            depth: 0,
            quoted: false,
            escaped: false,
        };
        true
    }

    fn arguments(&mut self, pieces: &mut Vec<ToolPiece>) -> bool {
        let State::Arguments {
            mut depth,
            mut quoted,
            mut escaped,
        } = self.state
        else {
            return false;
        };
        let mut end = None;
        for (at, byte) in self.held.bytes().enumerate() {
            match byte {
                _ if escaped => escaped = false,
                b'\\' if quoted => escaped = true,
                b'"' => quoted = !quoted,
                b'{' | b'[' if !quoted => depth += 1,
                b'}' | b']' if !quoted => {
                    depth = depth.saturating_sub(1);
                    if depth == 0 {
                        end = Some(at + 1);
                        break;
                    }
                }
                _ => {}
            }
        }
        let taken = end.unwrap_or(self.held.len());
        if taken > 0 {
            pieces.push(ToolPiece::Input(self.held.drain(..taken).collect()));
        }
        self.state = State::Arguments {
            depth,
            quoted,
            escaped,
        };
        if end.is_some() {
            pieces.push(ToolPiece::End);
            self.state = State::Tail;
        }
        end.is_some()
    }

    fn tail(&mut self) -> bool {
        let tail = self.syntax.after_arguments.as_str();
        if self.held.starts_with(tail) {
            self.held.drain(..tail.len());
            self.state = State::Text;
            return true;
        }
        if tail.starts_with(&self.held) {
            return false;
        }
        self.state = State::Text;
        true
    }

    fn custom_head(&mut self, pieces: &mut Vec<ToolPiece>) -> bool {
        let Some(n) = self.held.find(CUSTOM_INPUT) else {
            return false;
        };
        let name = self.held[..n].to_string();
        self.held.drain(..n + CUSTOM_INPUT.len());
        pieces.push(ToolPiece::Begin {
            kind: CallKind::Custom,
            name,
        });
        self.called = true;
        self.state = State::Custom;
        true
    }

    /// Under the grammar this does not come about; text that is none of its calls stays text.
    fn not_a_call(&mut self, pieces: &mut Vec<ToolPiece>) -> bool {
        pieces.push(ToolPiece::Text(self.syntax.trigger().to_string()));
        self.state = State::Text;
        true
    }
}

/// How much of the end of `text` is a beginning of `opening`.
fn overlap(text: &str, opening: &str) -> usize {
    (1..=opening.len().min(text.len()))
        .rev()
        .find(|&n| opening.is_char_boundary(n) && text.ends_with(&opening[..n]))
        .unwrap_or(0)
}
