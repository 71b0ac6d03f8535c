//! What the fuzz targets of `bantam-formats` check of any bytes; the corpus is replayed by that crate's tests too.

use bantam_formats::hf::TokenizerConfig;
use bantam_formats::{Gguf, HfConfig, JsonlReader, SafetensorsFile, TensorInfo, TensorRef};

/// A GGUF file that is accepted has tensors that can be read and whose lengths agree.
pub(crate) fn gguf(data: &[u8]) {
    let Ok(gguf) = Gguf::from_bytes(data.to_vec()) else {
        return;
    };
    for info in gguf.tensors() {
        agrees(
            info,
            gguf.tensor(&info.name).expect("a listed tensor is found"),
        );
    }
    for (key, value) in gguf.metadata().iter() {
        assert!(!value.brief().is_empty());
        assert!(gguf.metadata().get(key).is_some());
        let _ = gguf.metadata().u32_array(key);
    }
}

/// The same of a safetensors file, whose tensors also cover its data.
pub(crate) fn safetensors(data: &[u8]) {
    let Ok(file) = SafetensorsFile::from_bytes(data.to_vec()) else {
        return;
    };
    for info in file.tensors() {
        agrees(
            info,
            file.tensor(&info.name).expect("a listed tensor is found"),
        );
    }
}

fn agrees(info: &TensorInfo, tensor: TensorRef<'_>) {
    assert_eq!(
        tensor.dtype.bytes_of(&tensor.shape),
        Some(tensor.bytes.len())
    );
    assert_eq!(
        (&info.shape, info.n_bytes),
        (&tensor.shape, tensor.bytes.len())
    );
}

/// A configuration that is accepted has numbers that can be computed with.
pub(crate) fn hf_config(data: &[u8]) {
    if let Ok(config) = HfConfig::parse(data) {
        assert!(config.head_width() > 0 && config.context() > 0 && config.vocab_size > 0);
        assert!(config.num_attention_heads % config.n_kv_heads() == 0);
        assert!(config.rope_base() >= 1.0 && config.rms_norm_eps > 0.0);
    }
    if let Ok(config) = serde_json::from_slice::<TokenizerConfig>(data) {
        let _ = config.chat_template();
    }
}

/// Line numbers rise, and reading ends.
pub(crate) fn jsonl(data: &[u8]) {
    let mut last = 0;
    for row in JsonlReader::new(data, "rows.jsonl").with_caps(1 << 12, 1 << 16) {
        match row {
            Ok((line, _)) => {
                assert!(line > last);
                last = line;
            }
            Err(error) => assert!(error.to_string().starts_with("rows.jsonl:")),
        }
    }
}
