//! Stop strings over a stream of text.
//!
//! Text that could be the beginning of a stop string is held back until it is clear, so that no part of a
//! stop string is ever shown.

/// Watches a stream for the first of several strings.
#[derive(Debug, Clone)]
pub struct StopStrings {
    stops: Vec<String>,
    held: String,
    stopped: bool,
}

/// What came of a push.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Watched {
    /// Text that is safe to show.
    pub text: String,
    /// The stop string that was found; nothing comes after it.
    pub stop: Option<String>,
}

impl StopStrings {
    /// Watches for these strings; empty ones are left out.
    pub fn new(stops: &[String]) -> Self {
        let stops = stops.iter().filter(|s| !s.is_empty()).cloned().collect();
        StopStrings {
            stops,
            held: String::new(),
            stopped: false,
        }
    }

    /// Takes more text. After a stop string was found, everything is swallowed.
    pub fn push(&mut self, text: &str) -> Watched {
        if self.stopped {
            return Watched {
                text: String::new(),
                stop: None,
            };
        }
        if self.stops.is_empty() {
            return Watched {
                text: text.to_string(),
                stop: None,
            };
        }
        self.held.push_str(text);
        // The one that ends first wins, and of two that end together the longer, so that it does not matter in
        // which pieces the text comes.
        let found = self
            .stops
            .iter()
            .filter_map(|s| self.held.find(s.as_str()).map(|at| (at + s.len(), at, s)));
        if let Some((_, at, stop)) = found.min_by_key(|(end, at, _)| (*end, *at)) {
            let stop = stop.clone();
            let text = self.held[..at].to_string();
            self.held.clear();
            self.stopped = true;
            return Watched {
                text,
                stop: Some(stop),
            };
        }
        let keep = self
            .stops
            .iter()
            .map(|s| overlap(&self.held, s))
            .max()
            .unwrap_or(0);
        let held = self.held.split_off(self.held.len() - keep);
        Watched {
            text: std::mem::replace(&mut self.held, held),
            stop: None,
        }
    }

    /// What was held back, when the stream ends without a stop string.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// The length of the longest end of `text` that begins `stop`.
fn overlap(text: &str, stop: &str) -> usize {
    let longest = text.len().min(stop.len().saturating_sub(1));
    (1..=longest)
        .rev()
        .find(|&n| stop.is_char_boundary(n) && text.as_bytes().ends_with(&stop.as_bytes()[..n]))
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn holds_back_a_possible_beginning() {
        let mut s = StopStrings::new(&["###".into(), "".into()]);
        assert_eq!(s.push("a#").text, "a");
        assert_eq!(s.push("#").text, "");
        assert_eq!(s.push("b").text, "##b");
        assert_eq!(
            s.push("c##"),
            Watched {
                text: "c".into(),
                stop: None
            }
        );
        assert_eq!(
            s.push("#d"),
            Watched {
                text: String::new(),
                stop: Some("###".into())
            }
        );
        assert_eq!(s.push("e").text, "");
        assert_eq!(s.finish(), "");
    }

    #[test]
    fn what_is_held_comes_out_at_the_end() {
        let mut s = StopStrings::new(&["\n\n".into()]);
        assert_eq!(s.push("x\n").text, "x");
        assert_eq!(s.finish(), "\n");
    }

    proptest! {
        /// However the text is cut, the outcome is that of searching the whole text.
        #[test]
        fn equals_a_search_of_the_whole(text in "[abé]{0,24}", cuts in prop::collection::vec(0usize..24, 0..6), stops in prop::collection::vec("[abé]{1,3}", 0..3)) {
            let mut marks: Vec<usize> = cuts.into_iter().filter(|&c| text.is_char_boundary(c)).collect();
            marks.push(0);
            marks.push(text.len());
            marks.sort_unstable();
            let mut watch = StopStrings::new(&stops);
            let mut shown = String::new();
            let mut found = false;
            for pair in marks.windows(2) {
                let w = watch.push(&text[pair[0]..pair[1]]);
                shown.push_str(&w.text);
                found |= w.stop.is_some();
            }
            shown.push_str(&watch.finish());
            let first = stops.iter().filter_map(|s| text.find(s.as_str()).map(|at| (at + s.len(), at))).min();
            prop_assert_eq!(found, first.is_some());
            prop_assert_eq!(shown.as_str(), first.map_or(text.as_str(), |(_, at)| &text[..at]));
        }
    }
}
