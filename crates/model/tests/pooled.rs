//! A decoder's vectors: the mean of the golden's rows, and the same bits alone and among others.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use bantam_formats::open_model;
use bantam_kernels::{Compute, Isa};
use bantam_model::{Model, Weights};
use bantam_testkit::golden::{ALL, Golden};

#[test]
fn vectors_are_the_mean_of_the_rows_behind_the_last_norm() {
    for name in ALL {
        let golden = Golden::load(name);
        let files = open_model(golden.model_dir()).unwrap();
        let model = Model::<f32>::load(&files, Weights::F32, false).unwrap();
        let (tokens, d) = (golden.tokens(), golden.shape("hidden.norm")[1]);
        let rows = golden.f64("hidden.norm");
        let (mut start, mut sequences, mut want) = (0, Vec::new(), Vec::new());
        for n in golden.seq_lens() {
            sequences.push(&tokens[start..start + n]);
            let own = &rows[start * d..(start + n) * d];
            let mut mean: Vec<f64> = (0..d)
                .map(|i| own.iter().skip(i).step_by(d).sum())
                .collect();
            let length = mean.iter().map(|x| x * x).sum::<f64>().sqrt();
            mean.iter_mut().for_each(|x| *x /= length);
            want.push(mean);
            start += n;
        }
        for isa in Isa::available() {
            let got = model.embed(&sequences, None, &Compute::with_isa(2, isa));
            for ((got, want), sequence) in got.iter().zip(&want).zip(&sequences) {
                let cosine: f64 = got.iter().zip(want).map(|(&a, b)| f64::from(a) * b).sum();
                assert!((cosine - 1.0).abs() < 1e-6, "{name}: cosine {cosine}");
                let alone = model.embed(&[sequence], None, &Compute::with_isa(1, isa));
                assert_eq!(&alone[0], got, "{name} on {}", isa.name());
            }
        }
    }
}
