//! Reference values from PyTorch, read from `goldens/`.
//!
//! `goldens/make_goldens.py` makes them and documents every tensor's name. Variants: [`TIED`], [`BIASED`], [`MHA`].

use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};

/// Grouped-query attention, head tied to the embedding; the only variant with gradients of the base weights.
pub const TIED: &str = "tied";
/// Own head, biases everywhere, `n_heads * head_dim != d_model`, RoPE scaled as in Llama 3.
pub const BIASED: &str = "biased";
/// Multi-head attention, awkward widths, linear RoPE scaling, `rope_parameters` instead of `rope_theta`.
pub const MHA: &str = "mha";
/// Every variant.
pub const ALL: [&str; 3] = [TIED, BIASED, MHA];

/// One variant: a Hugging Face folder with a miniature model, and what PyTorch computes with it.
#[derive(Debug)]
pub struct Golden {
    folder: PathBuf,
    bytes: Vec<u8>,
}

impl Golden {
    /// Reads the variant `name`; panics with the path if it is missing or damaged.
    #[track_caller]
    pub fn load(name: &str) -> Golden {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("goldens")
            .join(name);
        let path = folder.join("golden.safetensors");
        let bytes = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        SafeTensors::deserialize(&bytes).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        Golden { folder, bytes }
    }

    /// The folder with `config.json` and `model.safetensors`.
    pub fn model_dir(&self) -> &Path {
        &self.folder
    }

    /// Every tensor's name, sorted.
    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self
            .tensors()
            .names()
            .iter()
            .map(|n| (*n).to_owned())
            .collect();
        names.sort();
        names
    }

    /// The names that start with `prefix`, without it, sorted: `with_prefix("lora.")` lists the adapter's tensors.
    pub fn with_prefix(&self, prefix: &str) -> Vec<String> {
        self.names()
            .iter()
            .filter_map(|n| n.strip_prefix(prefix))
            .map(str::to_owned)
            .collect()
    }

    /// Whether there is a tensor `name`.
    pub fn has(&self, name: &str) -> bool {
        self.tensors().tensor(name).is_ok()
    }

    /// The shape of `name`.
    #[track_caller]
    pub fn shape(&self, name: &str) -> Vec<usize> {
        self.view(name).shape().to_vec()
    }

    /// The elements of a float tensor, in f64 (exact whatever the stored type).
    #[track_caller]
    pub fn f64(&self, name: &str) -> Vec<f64> {
        let view = self.view(name);
        match view.dtype() {
            Dtype::F32 => chunks(view.data())
                .map(|b| f64::from(f32::from_le_bytes(b)))
                .collect(),
            Dtype::F64 => chunks(view.data()).map(f64::from_le_bytes).collect(),
            other => panic!("`{name}` is {other:?}, not a float"),
        }
    }

    /// The elements of a float tensor, in f32.
    #[track_caller]
    pub fn f32(&self, name: &str) -> Vec<f32> {
        self.f64(name).into_iter().map(|x| x as f32).collect()
    }

    /// A float tensor of one element.
    #[track_caller]
    pub fn scalar(&self, name: &str) -> f64 {
        let values = self.f64(name);
        assert_eq!(values.len(), 1, "`{name}` is no scalar");
        values[0]
    }

    /// The elements of an integer tensor.
    #[track_caller]
    pub fn ints(&self, name: &str) -> Vec<u32> {
        let view = self.view(name);
        assert_eq!(view.dtype(), Dtype::I64, "`{name}` is no integer tensor");
        chunks(view.data())
            .map(|b| u32::try_from(i64::from_le_bytes(b)).unwrap())
            .collect()
    }

    /// The tokens of both sequences, end to end.
    pub fn tokens(&self) -> Vec<u32> {
        self.ints("tokens")
    }

    /// The length of each sequence.
    pub fn seq_lens(&self) -> Vec<usize> {
        self.ints("seq_lens")
            .into_iter()
            .map(|n| n as usize)
            .collect()
    }

    /// `(pos, token)` of every target: the logits at `pos` must predict `token`; all weigh the same.
    pub fn targets(&self) -> Vec<(u32, u32)> {
        self.ints("target.pos")
            .into_iter()
            .zip(self.ints("target.token"))
            .collect()
    }

    fn tensors(&self) -> SafeTensors<'_> {
        SafeTensors::deserialize(&self.bytes).expect("checked in `load`")
    }

    #[track_caller]
    fn view(&self, name: &str) -> safetensors::tensor::TensorView<'_> {
        let all = SafeTensors::deserialize(&self.bytes).expect("checked in `load`");
        all.tensor(name)
            .unwrap_or_else(|_| panic!("no golden `{name}` in {}", self.folder.display()))
    }
}

fn chunks<const N: usize>(bytes: &[u8]) -> impl Iterator<Item = [u8; N]> {
    bytes
        .chunks_exact(N)
        .map(|c| c.try_into().expect("chunks of N bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_variant_is_whole() {
        for name in ALL {
            let golden = Golden::load(name);
            let n = golden.tokens().len();
            assert_eq!(golden.seq_lens().iter().sum::<usize>(), n);
            assert_eq!(golden.shape("logits")[0], n);
            for (pos, token) in golden.targets() {
                assert_eq!(golden.tokens()[pos as usize + 1], token);
            }
            let lora = golden.with_prefix("lora.");
            assert_eq!(
                lora.len(),
                2 * 7 * 2,
                "A and B of seven projections in two layers"
            );
            assert_eq!(lora, golden.with_prefix("lora_grad."));
            assert_eq!(lora, golden.with_prefix("lora_final."));
            assert_eq!(golden.f64("train.loss").len(), 10);
            assert_eq!(golden.f64("train.loss")[0], golden.scalar("lora_loss"));
            assert_eq!(golden.has("base_grad.model.norm.weight"), name == TIED);
            assert!(golden.model_dir().join("config.json").is_file());
        }
    }

    #[test]
    fn the_stored_loss_follows_from_the_stored_logits() {
        for name in ALL {
            let golden = Golden::load(name);
            let logits = golden.f64("logits");
            let vocab = golden.shape("logits")[1];
            let targets = golden.targets();
            let mut loss = 0.0;
            for &(pos, token) in &targets {
                let row = &logits[pos as usize * vocab..][..vocab];
                let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let log_sum = row.iter().map(|x| (x - max).exp()).sum::<f64>().ln() + max;
                loss += log_sum - row[token as usize];
            }
            loss /= targets.len() as f64;
            assert!(
                (loss - golden.scalar("loss")).abs() < 1e-6,
                "{name}: {loss}"
            );
        }
    }

    #[test]
    fn all_goldens_fit_in_two_megabytes() {
        let mut total = 0;
        for name in ALL {
            for file in ["config.json", "model.safetensors", "golden.safetensors"] {
                let path = Golden::load(name).model_dir().join(file);
                total += std::fs::metadata(path).unwrap().len();
            }
        }
        assert!(total < 2_000_000, "{total} bytes");
    }
}
