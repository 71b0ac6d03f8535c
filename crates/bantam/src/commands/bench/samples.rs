//! One figure, measured several times.

use serde::Serialize;

/// What the rounds found for one figure.
#[derive(Debug, Clone, Default)]
pub(crate) struct Samples(Vec<f64>);

/// Least, middle and greatest of the rounds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Spread {
    /// The least.
    pub(crate) min: f64,
    /// The middle one; of an even number, the mean of the two in the middle.
    pub(crate) median: f64,
    /// The greatest.
    pub(crate) max: f64,
    /// How many there were.
    pub(crate) rounds: usize,
}

impl Samples {
    /// Adds a round's value.
    pub(crate) fn push(&mut self, value: f64) {
        self.0.push(value);
    }

    /// What they come to; none without a round.
    pub(crate) fn spread(&self) -> Option<Spread> {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        let (below, above) = (sorted[(sorted.len() - 1) / 2], sorted[sorted.len() / 2]);
        Some(Spread {
            min,
            median: (below + above) / 2.0,
            max,
            rounds: sorted.len(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spread(values: &[f64]) -> Option<Spread> {
        Samples(values.to_vec()).spread()
    }

    #[test]
    fn the_middle_of_the_rounds_is_told_with_their_ends() {
        let three = spread(&[3.0, 1.0, 10.0]).unwrap();
        assert_eq!((three.min, three.median, three.max), (1.0, 3.0, 10.0));
        assert_eq!(spread(&[4.0, 1.0, 2.0, 3.0]).unwrap().median, 2.5);
        assert_eq!(spread(&[]), None);
    }
}
