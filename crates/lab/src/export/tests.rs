//! Adapters there and back, hostile ones refused, and merged models that compute what base and adapter do.

use std::fs;
use std::path::Path;

use bantam_formats::{DType, GgufWriter, Metadata, ModelFiles, TensorSpec, Value, open_model};
use bantam_kernels::Compute;
use bantam_model::{Lora, Model, ModelConfig, PackedBatch, Target, TrainWorkspace, Weights};
use bantam_testkit::golden::{self, Golden};
use serde_json::json;

use super::*;
use crate::train::{AdapterFile, TrainError};

/// A variant's model, its files, and the adapter PyTorch used on it.
struct Bench {
    golden: Golden,
    files: ModelFiles,
    config: ModelConfig,
    adapter: Adapter,
}

fn bench(name: &str) -> Bench {
    let golden = Golden::load(name);
    let files = open_model(golden.model_dir()).unwrap();
    let config = ModelConfig::from_files(&files).unwrap();
    let lora = bantam_model::LoraConfig {
        rank: 4,
        alpha: 8.0,
        targets: bantam_model::Proj::ALL.to_vec(),
    };
    let layout = bantam_model::LoraLayout::new(&lora, &config);
    let mut params = vec![0f32; layout.n_params()];
    for tensor in layout.tensors() {
        params[tensor.range.clone()]
            .copy_from_slice(&golden.f32(&format!("lora.{}", peft_name(tensor))));
    }
    let identity = AdapterIdentity {
        version: "0.1.0".into(),
        base: "tiny".into(),
        base_sha256: "5a".into(),
        system: "Be brief.".into(),
        chat_template: Some("{{ messages }}".into()),
    };
    Bench {
        golden,
        files,
        config,
        adapter: Adapter {
            config: lora,
            params,
            identity: Some(identity),
        },
    }
}

impl Bench {
    fn batch(&self) -> PackedBatch {
        let targets = self.golden.targets().into_iter();
        let targets = targets.map(|(pos, token)| Target {
            pos,
            token,
            weight: 1.0,
        });
        PackedBatch::rows(
            self.golden.tokens(),
            self.golden.seq_lens(),
            targets.collect(),
        )
    }

    /// Mean loss of a model without an adapter, or with this bench's.
    fn loss(&self, files: &ModelFiles, adapted: bool) -> f64 {
        let model = Model::<f32>::load(files, Weights::F32, false).unwrap();
        let mut lora = Lora::new(self.adapter.config.clone(), model.config());
        lora.params.copy_from_slice(&self.adapter.params);
        lora.refresh();
        let lora = adapted.then_some(&lora);
        model
            .loss(
                lora,
                &self.batch(),
                &mut TrainWorkspace::default(),
                &Compute::new(1),
            )
            .mean()
    }

    fn write(&self, dir: &Path) {
        let layout = bantam_model::LoraLayout::new(&self.adapter.config, &self.config);
        let identity = self.adapter.identity.as_ref().unwrap();
        put(
            dir,
            &adapter_files(
                &self.adapter.config,
                &layout,
                &self.adapter.params,
                identity,
            )
            .unwrap(),
        );
    }
}

fn put(dir: &Path, files: &[AdapterFile]) {
    fs::create_dir_all(dir).unwrap();
    files
        .iter()
        .for_each(|file| fs::write(dir.join(&file.name), &file.bytes).unwrap());
}

#[test]
fn an_adapter_comes_back_to_the_bit_under_the_names_of_peft() {
    let (bench, dir) = (bench(golden::BIASED), tempfile::tempdir().unwrap());
    bench.write(dir.path());
    assert_eq!(
        read_adapter(dir.path(), &bench.config).unwrap(),
        bench.adapter
    );
    let file = bantam_formats::SafetensorsFile::open(&dir.path().join("adapter_model.safetensors"))
        .unwrap();
    let mut names: Vec<String> = file.tensors().iter().map(|t| t.name.clone()).collect();
    names.sort();
    assert_eq!(names, bench.golden.with_prefix("lora."));
    let again = tempfile::tempdir().unwrap();
    bench.write(again.path());
    for name in [
        "adapter_model.safetensors",
        "adapter_config.json",
        "bantam.json",
        "chat_template.jinja",
    ] {
        assert_eq!(
            fs::read(dir.path().join(name)).unwrap(),
            fs::read(again.path().join(name)).unwrap()
        );
    }
    insta::assert_snapshot!(fs::read_to_string(dir.path().join("adapter_config.json")).unwrap());
    insta::assert_snapshot!(fs::read_to_string(dir.path().join("bantam.json")).unwrap());
}

#[test]
fn adapters_that_do_not_fit_are_refused() {
    let (bench, dir) = (bench(golden::TIED), tempfile::tempdir().unwrap());
    let refused = || {
        let error = read_adapter(dir.path(), &bench.config).unwrap_err();
        error
            .to_string()
            .replace(&dir.path().display().to_string(), "DIR")
    };
    let config_with = |key: &str, value: serde_json::Value| {
        bench.write(dir.path());
        let path = dir.path().join("adapter_config.json");
        let mut config: serde_json::Value =
            serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        config[key] = value;
        fs::write(&path, config.to_string()).unwrap();
        refused()
    };
    assert!(config_with("use_dora", json!(true)).contains("`use_dora` cannot be used here"));
    assert!(config_with("bias", json!("all")).contains("trained biases"));
    assert!(config_with("modules_to_save", json!(["lm_head"])).contains("`modules_to_save`"));
    assert!(config_with("alpha_pattern", json!({"q_proj": 3})).contains("`alpha_pattern`"));
    assert!(config_with("r", json!(0)).contains("`r` is 0"));
    assert!(config_with("r", json!(1u64 << 60)).contains("expected 1 to 1024"));
    assert!(config_with("r", json!(8)).contains("has shape [4, 64], but this base needs [8, 64]"));
    assert!(config_with("lora_alpha", json!(-1)).contains("`lora_alpha` is -1"));
    assert!(config_with("lora_alpha", json!("wide")).contains("adapter_config.json: invalid type"));

    // Another base, a torn file, a number that is none, a tensor too few, one too many.
    bench.write(dir.path());
    let other = ModelConfig {
        d_model: 32,
        ..bench.config.clone()
    };
    assert!(matches!(
        read_adapter(dir.path(), &other),
        Err(TrainError::Adapter { .. })
    ));
    let deeper = ModelConfig {
        n_layers: 3,
        ..bench.config.clone()
    };
    assert!(
        read_adapter(dir.path(), &deeper)
            .unwrap_err()
            .to_string()
            .contains("is missing")
    );
    let shallower = ModelConfig {
        n_layers: 1,
        ..bench.config.clone()
    };
    assert!(
        read_adapter(dir.path(), &shallower)
            .unwrap_err()
            .to_string()
            .contains("has no place in this base")
    );
    let path = dir.path().join("adapter_model.safetensors");
    let bytes = fs::read(&path).unwrap();
    for cut in [0, 7, 100, bytes.len() - 1] {
        fs::write(&path, &bytes[..cut]).unwrap();
        assert!(read_adapter(dir.path(), &bench.config).is_err());
    }
    let mut bad = bytes.clone();
    let end = bad.len();
    bad[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&path, &bad).unwrap();
    assert!(refused().contains("not finite"));
}

#[test]
fn a_merged_folder_computes_what_base_and_adapter_do() {
    for name in golden::ALL {
        let (bench, dir) = (bench(name), tempfile::tempdir().unwrap());
        merge(
            &bench.files,
            Some(&bench.adapter),
            MergeFormat::Folder(DType::F32),
            dir.path(),
        )
        .unwrap();
        let expected = bench.loss(&bench.files, true);
        let merged = bench.loss(&open_model(dir.path()).unwrap(), false);
        assert!(
            (expected - merged).abs() < 1e-5,
            "{name}: {expected} {merged}"
        );
        assert!((expected - bench.golden.scalar("lora_loss")).abs() < 1e-4);
        assert_eq!(
            fs::read_to_string(dir.path().join("chat_template.jinja")).unwrap(),
            "{{ messages }}"
        );
    }
}

/// A GGUF file of a variant: rows of queries and keys in the order such files have.
fn write_gguf(bench: &Bench, path: &Path) {
    let c = &bench.config;
    let mut metadata = Metadata::new();
    metadata.insert("general.architecture", Value::Str("llama".into()));
    for (key, n) in [
        ("embedding_length", c.d_model),
        ("block_count", c.n_layers),
        ("attention.head_count", c.n_heads),
        ("attention.head_count_kv", c.n_kv_heads),
        ("attention.key_length", c.head_dim),
        ("feed_forward_length", c.d_ffn),
        ("context_length", c.max_context),
    ] {
        metadata.insert(format!("llama.{key}"), Value::U32(n as u32));
    }
    metadata.insert("llama.rope.freq_base", Value::F32(c.rope_theta as f32));
    metadata.insert(
        "llama.attention.layer_norm_rms_epsilon",
        Value::F32(c.rms_norm_eps as f32),
    );
    let tokenizer = bantam_testkit::tiny::tokenizer_json();
    let strings =
        |list: Vec<&str>| bantam_formats::Array::Str(list.into_iter().map(str::to_owned).collect());
    let mut tokens: Vec<&str> = tokenizer["model"]["vocab"]
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect();
    tokens.truncate(c.vocab);
    let merges = tokenizer["model"]["merges"]
        .as_array()
        .unwrap()
        .iter()
        .map(|m| m.as_str().unwrap())
        .collect();
    let types: Vec<i32> = (0..tokens.len())
        .map(|id| if id < 3 { 3 } else { 1 })
        .collect();
    metadata.insert("tokenizer.ggml.model", Value::Str("gpt2".into()));
    metadata.insert("tokenizer.ggml.pre", Value::Str("smollm".into()));
    metadata.insert("tokenizer.ggml.tokens", Value::Array(strings(tokens)));
    metadata.insert("tokenizer.ggml.merges", Value::Array(strings(merges)));
    metadata.insert(
        "tokenizer.ggml.token_type",
        Value::Array(bantam_formats::Array::I32(types)),
    );
    metadata.insert("tokenizer.ggml.eos_token_id", Value::U32(2));

    let source = bantam_model::FileSource::new(&bench.files, c);
    let gguf_name = |name: &str| {
        let pairs = [
            ("model.embed_tokens", "token_embd"),
            ("model.norm", "output_norm"),
            ("lm_head", "output"),
            ("model.layers", "blk"),
            ("self_attn.o_proj", "attn_output"),
            ("self_attn.", "attn_"),
            ("mlp.", "ffn_"),
            ("_proj", ""),
            ("input_layernorm", "attn_norm"),
            ("post_attention_layernorm", "ffn_norm"),
        ];
        pairs
            .iter()
            .fold(name.to_string(), |name, (hf, gguf)| name.replace(hf, gguf))
    };
    let mut tensors = Vec::new();
    for info in bench.files.tensors() {
        let tensor = bench.files.tensor(&source.file_name(&info.name)).unwrap();
        let mut values = bantam_model::read_tensor(&tensor);
        if info.name.contains("q_proj") || info.name.contains("k_proj") {
            let (half, cols) = (c.head_dim / 2, values.len() / info.shape[0]);
            let old = values.clone();
            for row in 0..info.shape[0] {
                let (head, i) = (row / c.head_dim, row % c.head_dim);
                let from = head * c.head_dim + (i % 2) * half + i / 2;
                values[row * cols..][..cols].copy_from_slice(&old[from * cols..][..cols]);
            }
        }
        tensors.push((gguf_name(&info.name), info.shape.clone(), values));
    }
    let specs: Vec<_> = tensors
        .iter()
        .map(|(name, shape, _)| TensorSpec::new(name, DType::F32, shape.clone()))
        .collect();
    let mut writer = GgufWriter::create(path, &metadata, &specs).unwrap();
    for (name, _, values) in &tensors {
        writer
            .tensor(
                name,
                &values
                    .iter()
                    .flat_map(|x| x.to_le_bytes())
                    .collect::<Vec<u8>>(),
            )
            .unwrap();
    }
    writer.finish().unwrap();
}

#[test]
fn a_merged_gguf_computes_what_base_and_adapter_do() {
    let (bench, dir) = (bench(golden::TIED), tempfile::tempdir().unwrap());
    let path = dir.path().join("base.gguf");
    write_gguf(&bench, &path);
    let base = open_model(&path).unwrap();
    let expected = bench.loss(&bench.files, true);
    assert!((bench.loss(&base, true) - expected).abs() < 1e-5);
    for (dtype, tolerance) in [
        (DType::F32, 1e-5),
        (DType::F16, 2e-3),
        (DType::BF16, 2e-2),
        (DType::Q8_0, 3e-2),
    ] {
        let out = dir.path().join("merged.gguf");
        merge(&base, Some(&bench.adapter), MergeFormat::Gguf(dtype), &out).unwrap();
        let merged = open_model(&out).unwrap();
        let loss = bench.loss(&merged, false);
        assert!(
            (loss - expected).abs() < tolerance,
            "{dtype}: {loss} {expected}"
        );
        assert_eq!(merged.tensor("blk.0.attn_q.weight").unwrap().dtype, dtype);
        assert_eq!(
            merged.tensor("blk.0.attn_norm.weight").unwrap().dtype,
            DType::F32
        );
        let ModelFiles::Gguf(gguf) = &merged else {
            panic!("not a GGUF file")
        };
        assert_eq!(
            gguf.metadata().str("tokenizer.chat_template"),
            Some("{{ messages }}")
        );
    }
    // A folder from the GGUF file has a configuration and a tokenizer that load.
    let folder = dir.path().join("folder");
    merge(
        &base,
        Some(&bench.adapter),
        MergeFormat::Folder(DType::F32),
        &folder,
    )
    .unwrap();
    let merged = open_model(&folder).unwrap();
    assert!((bench.loss(&merged, false) - expected).abs() < 1e-5);
    let tokenizer: serde_json::Value =
        serde_json::from_slice(&fs::read(folder.join("tokenizer.json")).unwrap()).unwrap();
    let original = bantam_testkit::tiny::tokenizer_json();
    assert_eq!(tokenizer["pre_tokenizer"], original["pre_tokenizer"]);
    assert_eq!(tokenizer["added_tokens"], original["added_tokens"]);
    assert_eq!(tokenizer["model"]["merges"], original["model"]["merges"]);
}

#[test]
fn a_folder_becomes_a_gguf_that_computes_the_same() {
    for name in [golden::TIED, golden::MHA] {
        let (bench, dir) = (bench(name), tempfile::tempdir().unwrap());
        // The goldens have no tokenizer: borrow the tiny model's, cut to their vocabulary.
        let base = dir.path().join("base");
        fs::create_dir(&base).unwrap();
        for file in ["config.json", "model.safetensors"] {
            fs::copy(bench.golden.model_dir().join(file), base.join(file)).unwrap();
        }
        let mut tokenizer = bantam_testkit::tiny::tokenizer_json();
        let vocab = tokenizer["model"]["vocab"].as_object_mut().unwrap();
        vocab.retain(|_, id| (id.as_u64().unwrap() as usize) < bench.config.vocab - 2);
        let n_tokens = vocab.len();
        fs::write(base.join("tokenizer.json"), tokenizer.to_string()).unwrap();
        let base = open_model(&base).unwrap();
        let out = dir.path().join("merged.gguf");
        merge(
            &base,
            Some(&bench.adapter),
            MergeFormat::Gguf(DType::F32),
            &out,
        )
        .unwrap();
        let merged = open_model(&out).unwrap();
        let (loss, expected) = (bench.loss(&merged, false), bench.loss(&base, true));
        assert!((loss - expected).abs() < 1e-5, "{name}: {loss} {expected}");
        let ModelFiles::Gguf(gguf) = &merged else {
            panic!("not a GGUF file")
        };
        let metadata = gguf.metadata();
        assert_eq!(metadata.str("tokenizer.ggml.pre"), Some("smollm"));
        assert_eq!(metadata.u64("tokenizer.ggml.eos_token_id"), Some(2));
        let tokens = metadata.str_array("tokenizer.ggml.tokens").unwrap();
        assert_eq!(
            (tokens.len(), tokens[1].as_str()),
            (bench.config.vocab, "<|im_start|>")
        );
        assert_eq!(tokens[n_tokens], format!("[PAD{n_tokens}]"));
        assert_eq!(
            metadata.str_array("tokenizer.ggml.merges").unwrap()[0],
            "Ġ t"
        );
    }
}

#[test]
fn formats_that_cannot_be_are_refused() {
    let (bench, dir) = (bench(golden::TIED), tempfile::tempdir().unwrap());
    let refused = |format| {
        let error = merge(
            &bench.files,
            Some(&bench.adapter),
            format,
            &dir.path().join("out"),
        )
        .unwrap_err();
        assert!(matches!(error, TrainError::Export { .. }), "{error}");
    };
    refused(MergeFormat::Folder(DType::Q8_0));
    refused(MergeFormat::Gguf(DType::Q4_K));
}
