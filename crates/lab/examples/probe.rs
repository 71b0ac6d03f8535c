//! Logits and greedy tokens of a model for given token ids, in f32, for comparison with other programs.
//!
//!     probe --model FILE|DIR [--adapter DIR] --asked FILE --told FILE [--logits FILE] [--threads N]
//!
//! `asked` is `{"prompts": [[ids]], "generate": N}`. `told` gets `{"tokens": [[ids]], "gaps": [[x]]}`: the N tokens
//! that greedy decoding adds to each prompt (the end of a turn does not stop it), and by how much the logit of each was
//! above the second. `--logits` gets the logits of every position of every prompt as raw little-endian f32.
//! `cargo xtask peers` runs it.

use std::collections::HashMap;
use std::error::Error;
use std::io::Write;
use std::path::Path;

use bantam_formats::open_model;
use bantam_kernels::Compute;
use bantam_lab::export::read_adapter;
use bantam_model::{InferWorkspace, KvCache, Lora, Model, Span, Wants, Weights};
use serde_json::{Value, json};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments = arguments()?;
    let needed = |name: &str| {
        arguments
            .get(name)
            .ok_or_else(|| format!("`{name}` is missing"))
    };
    let threads = arguments.get("--threads").map_or(Ok(1), |n| n.parse())?;
    let mut probe = Probe::open(
        Path::new(needed("--model")?),
        arguments.get("--adapter").map(Path::new),
        threads,
    )?;
    let asked: Value = serde_json::from_slice(&std::fs::read(needed("--asked")?)?)?;
    let prompts: Vec<Vec<u32>> = serde_json::from_value(asked["prompts"].clone())?;
    let n_generate = asked["generate"].as_u64().unwrap_or(0);

    if let Some(path) = arguments.get("--logits") {
        let mut out = std::io::BufWriter::new(std::fs::File::create(path)?);
        for prompt in &prompts {
            for logit in probe.logits(prompt) {
                out.write_all(&logit.to_le_bytes())?;
            }
        }
        out.flush()?;
    }
    let (mut tokens, mut gaps) = (Vec::new(), Vec::new());
    for prompt in &prompts {
        let (t, g) = probe.greedy(prompt, n_generate);
        tokens.push(t);
        gaps.push(g);
    }
    let told = json!({"tokens": tokens, "gaps": gaps});
    std::fs::write(needed("--told")?, told.to_string())?;
    Ok(())
}

fn arguments() -> Result<HashMap<String, String>, String> {
    let mut words = std::env::args().skip(1);
    let mut found = HashMap::new();
    while let Some(name) = words.next() {
        let value = words
            .next()
            .ok_or_else(|| format!("`{name}` needs a value"))?;
        found.insert(name, value);
    }
    Ok(found)
}

struct Probe {
    model: Model<f32>,
    lora: Option<Lora<f32>>,
    work: InferWorkspace,
    compute: Compute,
}

impl Probe {
    fn open(path: &Path, adapter: Option<&Path>, threads: usize) -> Result<Probe, Box<dyn Error>> {
        let model = Model::load(&open_model(path)?, Weights::F32, false)?;
        let lora = match adapter {
            None => None,
            Some(dir) => {
                let adapter = read_adapter(dir, model.config())?;
                let mut lora = Lora::new(adapter.config, model.config());
                lora.params = adapter.params;
                lora.refresh();
                Some(lora)
            }
        };
        Ok(Probe {
            model,
            lora,
            work: InferWorkspace::default(),
            compute: Compute::new(threads),
        })
    }

    /// The logits at every position.
    fn logits(&mut self, tokens: &[u32]) -> Vec<f32> {
        let mut cache = KvCache::new(self.model.config());
        self.forward(&mut cache, tokens, Wants::All)
    }

    /// The next `n` tokens, each the likeliest, and its lead over the second.
    fn greedy(&mut self, prompt: &[u32], n: u64) -> (Vec<u32>, Vec<f32>) {
        let mut cache = KvCache::new(self.model.config());
        let (mut tokens, mut gaps) = (Vec::new(), Vec::new());
        let mut next = prompt.to_vec();
        for _ in 0..n {
            let (token, gap) = top(&self.forward(&mut cache, &next, Wants::Last));
            tokens.push(token);
            gaps.push(gap);
            next = vec![token];
        }
        (tokens, gaps)
    }

    fn forward(&mut self, cache: &mut KvCache, tokens: &[u32], logits: Wants) -> Vec<f32> {
        let mut out = Vec::new();
        let span = Span {
            cache,
            tokens,
            logits,
            lora: self.lora.as_ref(),
        };
        self.model
            .forward(&mut [span], &mut out, &mut self.work, &self.compute);
        out
    }
}

/// The first of the largest logits, and how far it is above the next.
fn top(logits: &[f32]) -> (u32, f32) {
    let (mut best, mut first, mut second) = (0, f32::NEG_INFINITY, f32::NEG_INFINITY);
    for (token, &logit) in (0u32..).zip(logits) {
        if logit > first {
            (best, first, second) = (token, logit, first);
        } else if logit > second {
            second = logit;
        }
    }
    (best, first - second)
}
