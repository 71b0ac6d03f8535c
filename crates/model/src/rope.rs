//! Tables of rotary angles, grown as positions are needed.

use crate::{ModelConfig, RopeScaling};
use bantam_kernels::Real;

/// `cos` and `sin` of position times frequency: `[positions, Dh / 2]` each.
#[derive(Clone, Debug, Default)]
pub(crate) struct RopeTable<R> {
    cos: Vec<R>,
    sin: Vec<R>,
    half: usize,
}

impl<R: Real> RopeTable<R> {
    /// Makes sure that positions `0..n` are there.
    pub(crate) fn grow(&mut self, n: usize, config: &ModelConfig) {
        self.half = config.head_dim / 2;
        let have = self.cos.len() / self.half;
        if have >= n {
            return;
        }
        let frequencies = frequencies(config);
        for pos in have..n.next_power_of_two() {
            for &frequency in &frequencies {
                // Rounded to f32 as the reference implementation does, which trained models
                // have seen; the function of the angle itself is exact to the last place.
                let angle = f64::from(pos as f32 * frequency);
                self.cos.push(R::from_f32(angle.cos() as f32));
                self.sin.push(R::from_f32(angle.sin() as f32));
            }
        }
    }

    /// `(cos, sin)` of one position, `[Dh / 2]` each.
    pub(crate) fn at(&self, pos: usize) -> (&[R], &[R]) {
        let range = pos * self.half..(pos + 1) * self.half;
        (&self.cos[range.clone()], &self.sin[range])
    }
}

/// Angle per position of each pair: `theta^(-2i / Dh)`, stretched.
///
/// Source: Su et al. 2021, arXiv:2104.09864, section 3.2.2; the ramp of `Llama3` is that of
/// the Llama 3.1 model card's reference code.
fn frequencies(config: &ModelConfig) -> Vec<f32> {
    (0..config.head_dim / 2)
        .map(|i| {
            let exponent = (2 * i) as f32 / config.head_dim as f32;
            let plain = 1.0 / (config.rope_theta as f32).powf(exponent);
            match config.rope_scaling {
                RopeScaling::None => plain,
                RopeScaling::Linear { factor } => plain / factor as f32,
                RopeScaling::Llama3 {
                    factor,
                    low_freq_factor,
                    high_freq_factor,
                    original,
                } => {
                    let (factor, low, high) = (
                        factor as f32,
                        low_freq_factor as f32,
                        high_freq_factor as f32,
                    );
                    let original = original as f32;
                    let wavelength = 2.0 * std::f32::consts::PI / plain;
                    if wavelength > original / low {
                        plain / factor
                    } else if wavelength < original / high {
                        plain
                    } else {
                        let smooth = (original / wavelength - low) / (high - low);
                        (1.0 - smooth) * plain / factor + smooth * plain
                    }
                }
            }
        })
        .collect()
}
