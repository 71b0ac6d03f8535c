//! What the answers to one constraint found out about its states.
//!
//! A state is named by the tokens that lead to it. Label sets have few, and every answer passes the first
//! few of any grammar: those are worked out once. What follows free text is mostly new, so there is room
//! for so many states and no more.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use super::TokenMask;

/// What may follow, and whether nothing but an end token does.
pub(super) struct State {
    pub(super) mask: TokenMask,
    pub(super) is_done: bool,
}

/// The states known, by the tokens that lead to them.
#[derive(Default)]
pub(super) struct Known(Mutex<HashMap<Box<[u32]>, Arc<State>>>);

/// States that are kept: of 6 KiB each at a vocabulary of 49 152 tokens.
const STATES_MAX: usize = 512;
/// The longest way to a state that is kept.
const PATH_MAX: usize = 24;

impl Known {
    pub(super) fn get(&self, path: &[u32]) -> Option<Arc<State>> {
        if path.len() > PATH_MAX {
            return None;
        }
        let states = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        states.get(path).cloned()
    }

    pub(super) fn insert(&self, path: &[u32], state: &Arc<State>) {
        let mut states = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if path.len() <= PATH_MAX && states.len() < STATES_MAX {
            states.insert(path.into(), state.clone());
        }
    }
}
