//! Guesses at the next tokens, from what the prompt, the answer or the caller's prediction said after
//! the same words before.
//!
//! A guess is read in the same pass as the token before it. Where the model would have said the
//! same the answer is that much further, and where not nothing is lost but the row. Guesses change
//! how many passes an answer takes, never the answer.

/// How long a match is looked at; longer ones are as good.
const MATCH_MAX: usize = 8;
/// The rows of a step cost it so much more each than a step of none.
const ROW_COST: f32 = 0.2;

/// How often guesses came true, by how much of the text before them matched.
#[derive(Debug, Clone)]
pub(crate) struct Record {
    rates: [f32; MATCH_MAX],
}

/// A guess, as a place in a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Guess {
    /// How many tokens before it match, at least 1.
    pub(crate) matched: usize,
    /// Whether the text is the prediction, and not prompt and answer.
    predicted: bool,
    at: usize,
}

impl Default for Record {
    fn default() -> Self {
        Self {
            rates: [0.35, 0.5, 0.6, 0.7, 0.75, 0.8, 0.8, 0.85],
        }
    }
}

impl Record {
    /// How many tokens of a guess are worth their rows in a step of `n_rows` others.
    ///
    /// A step of `n` rows costs about `1 + ROW_COST n`, so it pays `(1 + ROW_COST n) / n` for a
    /// token. A guessed one is worth its row while it is likely enough to beat that. A kind of
    /// guess that is not tried is slowly forgiven, so that it is tried again.
    pub(crate) fn worth(&mut self, guess: Guess, n_rows: usize) -> usize {
        let slot = &mut self.rates[guess.matched - 1];
        let rate = *slot;
        let load = ROW_COST * n_rows as f32;
        let least = load / (1.0 + load);
        let mut chance = rate;
        let mut n = 0;
        while chance > least && n < 64 {
            n += 1;
            chance *= rate;
        }
        if n == 0 {
            *slot += 0.01 * (0.3 - rate).max(0.0);
        }
        n
    }

    /// Whether any guess at all could be worth its row in a step of `n_rows` others.
    pub(crate) fn is_any_worth(&self, n_rows: usize) -> bool {
        let load = ROW_COST * n_rows as f32;
        self.rates.iter().any(|&rate| rate > load / (1.0 + load))
    }

    /// Learns what became of a guess: `n_true` of `n` tokens.
    pub(crate) fn learn(&mut self, matched: usize, n: usize, n_true: usize) {
        let rate = &mut self.rates[matched - 1];
        for idx in 0..n.min(n_true + 1) {
            let outcome = if idx < n_true { 1.0 } else { 0.0 };
            *rate += 0.05 * (outcome - *rate);
        }
        *rate = rate.clamp(0.05, 0.98);
    }
}

/// Where the text went on after words like the last ones of `tokens`: the longest match, of equals
/// the latest; in the prediction rather than in the text itself.
///
/// At the beginning of an answer the prediction's own beginning is the guess.
pub(crate) fn guess(tokens: &[u32], n_generated: usize, prediction: &[u32]) -> Option<Guess> {
    if n_generated == 0 && !prediction.is_empty() {
        return Some(Guess {
            matched: MATCH_MAX,
            predicted: true,
            at: 0,
        });
    }
    let in_prediction = latest(prediction, tokens, prediction.len(), n_generated);
    let in_text = latest(tokens, tokens, tokens.len() - 1, tokens.len());
    let as_guess = |(matched, at), predicted| Guess {
        matched,
        predicted,
        at,
    };
    match (in_prediction, in_text) {
        (Some(p), Some(t)) if t.0 > p.0 => Some(as_guess(t, false)),
        (Some(p), _) => Some(as_guess(p, true)),
        (None, Some(t)) => Some(as_guess(t, false)),
        (None, None) => None,
    }
}

impl Guess {
    /// The tokens guessed, at most `n`.
    pub(crate) fn tokens<'a>(
        &self,
        tokens: &'a [u32],
        prediction: &'a [u32],
        n: usize,
    ) -> &'a [u32] {
        let text = if self.predicted { prediction } else { tokens };
        &text[self.at..(self.at + n).min(text.len())]
    }
}

/// The place in `text[..end]` after the longest run that equals the end of `tokens`, at most
/// `most` tokens of it, and that run's length.
fn latest(text: &[u32], tokens: &[u32], end: usize, most: usize) -> Option<(usize, usize)> {
    let (&last, before) = tokens.split_last()?;
    let most = most.min(MATCH_MAX);
    if most == 0 {
        return None;
    }
    let mut best: Option<(usize, usize)> = None;
    for (idx, _) in text[..end]
        .iter()
        .enumerate()
        .rev()
        .filter(|t| *t.1 == last)
    {
        let more = text[..idx].iter().rev().zip(before.iter().rev());
        let more = more.take(most - 1).take_while(|(a, b)| a == b).count();
        if idx + 1 < text.len() && best.is_none_or(|b| more + 1 > b.0) {
            best = Some((more + 1, idx + 1));
            if more + 1 == most {
                break;
            }
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_match_is_followed_and_the_latest_of_equals() {
        let follow = |tokens: &[u32]| {
            let guess = guess(tokens, 1, &[]);
            guess.map(|g| (g.matched, g.tokens(tokens, &[], 2).to_vec()))
        };
        assert_eq!(
            follow(&[1, 2, 3, 9, 2, 5, 1, 2]),
            Some((2, vec![3, 9])),
            "not the later but shorter match"
        );
        assert_eq!(follow(&[2, 3, 2, 4, 7, 2]), Some((1, vec![4, 7])));
        assert_eq!(follow(&[1, 2, 3]), None);
        assert_eq!(follow(&[7, 7]), Some((1, vec![7])));
    }

    #[test]
    fn a_prediction_is_followed_from_its_beginning_and_found_again() {
        let prediction = [5, 6, 7, 8, 9];
        let follow = |tokens: &[u32], n| {
            let guess = guess(tokens, n, &prediction);
            guess.map(|g| g.tokens(tokens, &prediction, 3).to_vec())
        };
        assert_eq!(follow(&[1, 2], 0), Some(vec![5, 6, 7]));
        assert_eq!(follow(&[1, 2, 5, 6], 2), Some(vec![7, 8, 9]));
        assert_eq!(follow(&[1, 2, 5, 66, 8], 3), Some(vec![9]));
        assert_eq!(follow(&[8, 3], 1), None);
    }

    #[test]
    fn guesses_shrink_with_failure_and_with_the_batch() {
        let mut record = Record::default();
        let guess = Guess {
            matched: 2,
            predicted: false,
            at: 0,
        };
        let alone = record.worth(guess, 1);
        assert!(alone >= 2);
        assert!(record.worth(guess, 16) < alone);
        assert_eq!(record.worth(guess, 256), 0);
        (0..50).for_each(|_| record.learn(2, 8, 8));
        assert!(record.worth(guess, 1) > alone);
        (0..100).for_each(|_| record.learn(2, 8, 0));
        assert_eq!(record.worth(guess, 1), 0);
        assert!((0..200).any(|_| record.worth(guess, 1) > 0), "tried again");
        assert!(
            record.worth(
                Guess {
                    matched: 3,
                    ..guess
                },
                1
            ) > 0
        );
    }
}
