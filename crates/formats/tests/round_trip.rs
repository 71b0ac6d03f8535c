//! What the writers write, the readers read back, and so does the reference implementation.

#![allow(clippy::unwrap_used)]

use bantam_formats::{
    Array, DType, FormatError, Gguf, GgufWriter, Metadata, Problem, SafetensorsFile,
    SafetensorsWriter, TensorRef, TensorSpec, Value, write_safetensors,
};
use proptest::prelude::*;
use std::collections::BTreeMap;

/// A tensor with the bytes to write.
type Owned = (TensorSpec, Vec<u8>);

/// Up to six tensors of given types, named apart, with few weights.
fn tensors(dtypes: Vec<DType>) -> impl Strategy<Value = Vec<Owned>> {
    let one = (
        prop::sample::select(dtypes),
        prop::collection::vec(1usize..4, 0..4),
        any::<u8>(),
    );
    prop::collection::vec(one, 0..6).prop_map(|list| {
        list.into_iter()
            .enumerate()
            .map(|(i, (dtype, mut shape, byte))| {
                match shape.last_mut() {
                    Some(row) => *row *= dtype.block_len(),
                    None if !dtype.is_plain() => shape = vec![dtype.block_len()],
                    None => {}
                }
                let n_bytes = dtype.bytes_of(&shape).unwrap();
                let bytes = (0..n_bytes).map(|i| byte.wrapping_add(i as u8)).collect();
                (
                    TensorSpec::new(format!("blk.{i}.weight"), dtype, shape),
                    bytes,
                )
            })
            .collect()
    })
}

fn array(depth: u32) -> BoxedStrategy<Array> {
    let flat = prop_oneof![
        any::<Vec<u8>>().prop_map(Array::U8),
        any::<Vec<i8>>().prop_map(Array::I8),
        any::<Vec<u16>>().prop_map(Array::U16),
        any::<Vec<i16>>().prop_map(Array::I16),
        any::<Vec<u32>>().prop_map(Array::U32),
        any::<Vec<i32>>().prop_map(Array::I32),
        any::<Vec<f32>>().prop_map(Array::F32),
        any::<Vec<bool>>().prop_map(Array::Bool),
        any::<Vec<String>>().prop_map(Array::Str),
        any::<Vec<u64>>().prop_map(Array::U64),
        any::<Vec<i64>>().prop_map(Array::I64),
        any::<Vec<f64>>().prop_map(Array::F64),
    ];
    if depth == 1 {
        return flat.boxed();
    }
    prop_oneof![3 => flat, 1 => prop::collection::vec(array(depth - 1), 0..3).prop_map(Array::Array)].boxed()
}

fn value() -> impl Strategy<Value = Value> {
    prop_oneof![
        any::<u8>().prop_map(Value::U8),
        any::<i8>().prop_map(Value::I8),
        any::<u16>().prop_map(Value::U16),
        any::<i16>().prop_map(Value::I16),
        any::<u32>().prop_map(Value::U32),
        any::<i32>().prop_map(Value::I32),
        any::<f32>().prop_map(Value::F32),
        any::<bool>().prop_map(Value::Bool),
        any::<String>().prop_map(Value::Str),
        any::<u64>().prop_map(Value::U64),
        any::<i64>().prop_map(Value::I64),
        any::<f64>().prop_map(Value::F64),
        array(4).prop_map(Value::Array),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn gguf(
        pairs in prop::collection::btree_map("[a-z.]{1,20}", value(), 0..6),
        tensors in tensors(DType::all().collect()),
        alignment in prop::option::of(3u32..8),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        let mut metadata = Metadata::new();
        pairs.into_iter().for_each(|(key, value)| metadata.insert(key, value));
        if let Some(power) = alignment {
            metadata.insert("general.alignment", 1u32 << power);
        }
        let specs: Vec<TensorSpec> = tensors.iter().map(|(spec, _)| spec.clone()).collect();
        let mut writer = GgufWriter::create(&path, &metadata, &specs).unwrap();
        for (spec, bytes) in &tensors {
            writer.tensor(&spec.name, bytes).unwrap();
        }
        writer.finish().unwrap();

        let gguf = Gguf::open(&path).unwrap();
        prop_assert_eq!(gguf.metadata(), &metadata);
        prop_assert_eq!(gguf.tensors().len(), tensors.len());
        for (spec, bytes) in &tensors {
            let tensor = gguf.tensor(&spec.name).unwrap();
            prop_assert_eq!(&TensorSpec::from(&tensor), spec);
            prop_assert_eq!(tensor.bytes, &bytes[..]);
        }
    }

    #[test]
    fn safetensors(
        metadata in prop::collection::btree_map(any::<String>(), any::<String>(), 0..4),
        tensors in tensors(vec![DType::F32, DType::F16, DType::BF16]),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        let refs: Vec<TensorRef<'_>> = tensors.iter().map(|(spec, bytes)| as_ref(spec, bytes)).collect();
        write_safetensors(&path, &refs, &metadata).unwrap();

        let ours = SafetensorsFile::open(&path).unwrap();
        let raw = std::fs::read(&path).unwrap();
        let theirs = safetensors::SafeTensors::deserialize(&raw).unwrap();
        prop_assert_eq!(ours.metadata(), &metadata);
        prop_assert_eq!(ours.tensors().len(), tensors.len());
        prop_assert_eq!(theirs.len(), tensors.len());
        for (spec, bytes) in &tensors {
            prop_assert_eq!(ours.tensor(&spec.name).unwrap(), as_ref(spec, bytes));
            let tensor = theirs.tensor(&spec.name).unwrap();
            prop_assert_eq!(tensor.data(), &bytes[..]);
            prop_assert_eq!(tensor.shape(), &spec.shape[..]);
            prop_assert_eq!(tensor.dtype().to_string(), spec.dtype.name());
        }
    }
}

fn as_ref<'a>(spec: &'a TensorSpec, bytes: &'a [u8]) -> TensorRef<'a> {
    TensorRef {
        name: &spec.name,
        dtype: spec.dtype,
        shape: spec.shape.clone(),
        bytes,
    }
}

#[test]
fn a_file_of_the_reference_implementation_is_read() {
    use safetensors::tensor::{Dtype, TensorView};
    let (floats, ints) = ([1u8; 24], [2u8; 16]);
    let views = [
        (
            "a",
            TensorView::new(Dtype::F32, vec![2, 3], &floats).unwrap(),
        ),
        (
            "empty",
            TensorView::new(Dtype::F32, vec![0, 3], &[]).unwrap(),
        ),
        ("ids", TensorView::new(Dtype::I64, vec![2], &ints).unwrap()),
    ];
    let bytes =
        safetensors::serialize(views, Some([("format".into(), "pt".into())].into())).unwrap();
    let file = SafetensorsFile::from_bytes(bytes).unwrap();
    assert_eq!(file.tensor("a").unwrap().shape, [2, 3]);
    assert_eq!(file.tensor("a").unwrap().bytes, floats);
    assert_eq!(file.tensor("empty").unwrap().bytes, [0u8; 0]);
    assert_eq!(file.tensor("ids"), None);
    assert_eq!(file.unsupported(), [("ids".to_string(), "I64".to_string())]);
    assert_eq!(file.metadata()["format"], "pt");
}

/// The problem of a refused file.
fn problem<T>(result: Result<T, FormatError>) -> Problem {
    match result {
        Err(FormatError::Invalid { problem, .. }) => problem,
        Err(other) => panic!("{other:?}"),
        Ok(_) => panic!("was accepted"),
    }
}

#[test]
fn a_writer_takes_what_was_announced_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model");
    let one = [TensorSpec::new("a", DType::F32, [2])];
    let none = BTreeMap::new();
    let gguf = || GgufWriter::create(&path, &Metadata::new(), &one).unwrap();
    let safetensors = || SafetensorsWriter::create(&path, &one, &none).unwrap();

    assert!(matches!(
        problem(gguf().tensor("b", &[0; 8])),
        Problem::Writer { .. }
    ));
    assert!(matches!(
        problem(gguf().tensor("a", &[0; 7])),
        Problem::Writer { .. }
    ));
    assert!(matches!(problem(gguf().finish()), Problem::Writer { .. }));
    assert!(matches!(
        problem(safetensors().tensor("b", &[0; 8])),
        Problem::Writer { .. }
    ));
    assert!(matches!(
        problem(safetensors().tensor("a", &[0; 9])),
        Problem::Writer { .. }
    ));
    assert!(matches!(
        problem(safetensors().finish()),
        Problem::Writer { .. }
    ));

    let twice = [one[0].clone(), one[0].clone()];
    assert!(matches!(
        problem(GgufWriter::create(&path, &Metadata::new(), &twice)),
        Problem::Duplicate { .. }
    ));
    assert!(matches!(
        problem(SafetensorsWriter::create(&path, &twice, &none)),
        Problem::Duplicate { .. }
    ));
    let ragged = [TensorSpec::new("a", DType::Q4_0, [33])];
    assert!(matches!(
        problem(GgufWriter::create(&path, &Metadata::new(), &ragged)),
        Problem::Shape { .. }
    ));
    let blocks = [TensorSpec::new("a", DType::Q4_0, [32])];
    assert!(matches!(
        problem(SafetensorsWriter::create(&path, &blocks, &none)),
        Problem::Writer { .. }
    ));
    assert_eq!(
        std::fs::read_dir(folder.path()).unwrap().count(),
        0,
        "something was left behind"
    );
}

#[test]
fn the_same_tensors_give_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let spec = |name| TensorSpec::new(name, DType::F32, [1]);
    let (a, b, c) = (spec("a"), spec("b"), TensorSpec::new("c", DType::F16, [3]));
    let metadata = BTreeMap::from([("k".to_string(), "v".to_string()), ("a".into(), "b".into())]);
    let tensors = [
        as_ref(&c, &[0; 6]),
        as_ref(&b, &[2; 4]),
        as_ref(&a, &[1; 4]),
    ];
    let (first, second) = (folder.path().join("1"), folder.path().join("2"));
    write_safetensors(&first, &tensors, &metadata).unwrap();
    let turned: Vec<_> = tensors.iter().rev().cloned().collect();
    write_safetensors(&second, &turned, &metadata).unwrap();
    assert_eq!(
        std::fs::read(&first).unwrap(),
        std::fs::read(&second).unwrap()
    );
    // Wide types first, so that all data are aligned.
    let names: Vec<_> = SafetensorsFile::open(&first)
        .unwrap()
        .tensors()
        .iter()
        .map(|t| t.name.clone())
        .collect();
    assert_eq!(names, ["a", "b", "c"]);
}
