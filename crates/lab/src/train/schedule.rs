//! The learning rate at each step.

use std::f64::consts::PI;

use crate::recipe::Schedule;

/// Learning rate of step `step` (from 0) of `total`: a linear warm-up times a decay that both run from step 0.
///
/// Math: lr min(1, (s+1)/w) d(s/total), with d(x) = (1 + cos(pi x))/2, 1 - x, or 1.
pub fn lr_at(schedule: Schedule, lr: f64, warmup_steps: usize, step: usize, total: usize) -> f64 {
    let warm = if warmup_steps == 0 {
        1.0
    } else {
        ((step + 1) as f64 / warmup_steps as f64).min(1.0)
    };
    let x = step as f64 / total as f64;
    let decay = match schedule {
        Schedule::Cosine => 0.5 * (1.0 + (PI * x).cos()),
        Schedule::Linear => 1.0 - x,
        Schedule::Constant => 1.0,
    };
    lr * warm * decay
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cosine_with_warm_up_as_in_python() {
        // [1e-3 * min(1, (s + 1) / 30) * 0.5 * (1 + math.cos(math.pi * s / 100)) for s in (0, 1, 29, 30, 50, 99)]
        let expected = [
            (0, 3.3333333333333335e-05),
            (1, 6.665021867885772e-05),
            (29, 0.0008064535268264883),
            (30, 0.0007938926261462367),
            (50, 0.0005),
            (99, 2.467198171342e-07),
        ];
        for (step, lr) in expected {
            let got = lr_at(Schedule::Cosine, 1e-3, 30, step, 100);
            assert!(
                (got - lr).abs() <= 1e-15 * 1e-3 + 1e-12 * lr,
                "step {step}: {got} {lr}"
            );
        }
    }

    #[test]
    fn linear_and_constant() {
        assert_eq!(lr_at(Schedule::Linear, 2.0, 0, 0, 4), 2.0);
        assert_eq!(lr_at(Schedule::Linear, 2.0, 0, 3, 4), 0.5);
        assert_eq!(lr_at(Schedule::Constant, 2.0, 4, 0, 8), 0.5);
        assert_eq!(lr_at(Schedule::Constant, 2.0, 4, 7, 8), 2.0);
    }
}
