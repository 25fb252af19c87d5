use std::collections::BTreeMap;

use tempfile::TempDir;
use tunefleet_proto::adapter::LoraConfig;

use super::super::support::{self, config, deltas, model, relative};
use super::*;
use crate::checkpoint::safetensors::WriteDtype;

/// A random base and an adapter on it, each in its directory.
struct Case {
    dir: TempDir,
    base: BTreeMap<String, Tensor>,
    adapter: Adapter,
}

/// Every value of the model in `dir`.
fn values(dir: &Path) -> BTreeMap<String, Tensor> {
    let files = ModelFiles::open(dir).unwrap();
    let blocks = (0..model().layers).flat_map(|block| model().block_parameters(block));
    let all = model().embed_parameters().into_iter().chain(blocks);
    let read = |p: tunefleet_proto::model::Parameter| {
        let mut values = Vec::new();
        let reader = files.reader(&p.hf_name).unwrap();
        reader.read_f32(&p.hf_name, 0..p.elements(), |_, piece| values.extend_from_slice(piece)).unwrap();
        let shape: Vec<i64> = p.shape.iter().map(|&n| n as i64).collect();
        (p.hf_name, Tensor::from_slice(&values).view(&shape[..]))
    };
    all.map(read).collect()
}

impl Case {
    fn new(config: LoraConfig, digest: Option<&str>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("base");
        model_dir::write(&out, &model(), Precision::Fp32, None, |p, sink| {
            let random = Tensor::randn([p.elements() as i64], (Kind::Float, tch::Device::Cpu)) * 0.2;
            sink(&Vec::<f32>::try_from(random).unwrap())
        })
        .unwrap();
        let base = values(&out);
        let mut adapter = support::adapter(config);
        if let Some(digest) = digest {
            adapter.metadata.insert(BASE_DIGEST_KEY.to_owned(), digest.to_owned());
        }
        adapter.write(&dir.path().join("adapter"), WriteDtype::F32).unwrap();
        Case { dir, base, adapter }
    }

    fn out(&self) -> PathBuf {
        self.dir.path().join("out")
    }

    fn merge(
        &self,
        dtype: Precision,
        any_base: bool,
        dequantized: Option<&Dequantized<'_>>,
    ) -> Result<Summary, Error> {
        merge(&Request {
            base: &self.dir.path().join("base"),
            adapter: &self.dir.path().join("adapter"),
            out: &self.out(),
            dtype,
            any_base,
            dequantized,
        })
    }

    fn digest(&self) -> String {
        let blocks = (0..model().layers).map(|block| model().block_parameters(block));
        let units = std::iter::once(model().embed_parameters()).chain(blocks).map(|unit| {
            let mut digest = UnitDigest::default();
            for p in unit {
                digest.parameter(&p.hf_name);
                digest.values(&Vec::<f32>::try_from(self.base[&p.hf_name].view([-1])).unwrap());
            }
            digest.finish()
        });
        base_digest::of_units(&units.collect::<Vec<_>>())
    }
}

fn all() -> LoraConfig {
    config(4, 8.0, &["c_attn", "c_proj", "c_fc"])
}

#[test]
fn a_merge_adds_the_difference_and_leaves_all_else() {
    let case = Case::new(LoraConfig { modules_to_save: vec!["ln_f".to_owned()], ..all() }, None);
    let summary = case.merge(Precision::Fp32, false, None).unwrap();
    assert_eq!((summary.linears, summary.replaced), (8, 2));
    let merged = values(&case.out());
    let deltas = deltas(&case.adapter);
    let mut largest = 0.0f64;
    for (name, base) in &case.base {
        let module = name.trim_end_matches(".weight");
        match deltas.get(module) {
            Some(delta) => {
                assert!(relative(&merged[name], &(base.to_kind(Kind::Double) + delta)) < 1e-6, "{name}");
                largest = largest.max(delta.abs().max().double_value(&[]));
            }
            None if name.contains("ln_f") => {
                assert_eq!(merged[name], case.adapter.tensors[&format!("{KEY_PREFIX}{name}")]);
            }
            None => assert_eq!(&merged[name], base, "{name}"),
        }
    }
    assert!((summary.largest - largest).abs() < 1e-6 && summary.rms > 0.0 && summary.rms < largest);
    case.merge(Precision::Bf16, false, None).unwrap();
    for (name, rounded) in values(&case.out()) {
        assert_eq!(rounded, merged[&name].to_kind(Kind::BFloat16).to_kind(Kind::Float), "{name}");
    }
}

#[test]
fn doras_rows_have_their_magnitude() {
    let case = Case::new(LoraConfig { dora: true, ..all() }, None);
    case.merge(Precision::Fp32, false, None).unwrap();
    let merged = values(&case.out());
    for (module, delta) in deltas(&case.adapter) {
        let name = format!("{module}.weight");
        let magnitude = &case.adapter.tensors[&format!("{KEY_PREFIX}{module}.lora_magnitude_vector")];
        let sum = case.base[&name].to_kind(Kind::Double) + delta;
        let norm = sum.square().sum_dim_intlist(1, true, Kind::Double).sqrt();
        let expected = sum / norm * magnitude.to_kind(Kind::Double).unsqueeze(1);
        assert!(relative(&merged[&name], &expected) < 1e-6, "{name}");
    }
}

#[test]
fn another_base_is_refused_with_both_digests_and_leaves_nothing_behind() {
    let right = Case::new(all(), None);
    let digest = right.digest();
    let mut named = right;
    named.adapter.metadata.insert(BASE_DIGEST_KEY.to_owned(), digest.clone());
    named.adapter.write(&named.dir.path().join("adapter"), WriteDtype::F32).unwrap();
    named.merge(Precision::Fp32, false, None).unwrap();

    let wrong = Case::new(all(), Some(&digest));
    let message = wrong.merge(Precision::Fp32, false, None).unwrap_err().to_string();
    for part in [digest.as_str(), &wrong.digest(), "trained on tiny", "--any-base"] {
        assert!(message.contains(part), "{part}: {message}");
    }
    let mut names: Vec<_> =
        std::fs::read_dir(wrong.dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["adapter", "base"]);
    wrong.merge(Precision::Fp32, true, None).unwrap();
}

#[test]
fn a_dequantised_base_is_that_of_every_linear_of_the_blocks() {
    let case = Case::new(config(4, 8.0, &["c_attn"]), None);
    let whole = |weight: &Tensor| -> Result<Tensor, Error> { Ok((weight * 10.0).round() / 10.0) };
    let summary = case.merge(Precision::Fp32, false, Some(&whole)).unwrap();
    assert_eq!(summary.linears, 2);
    let (merged, deltas) = (values(&case.out()), deltas(&case.adapter));
    for (name, base) in &case.base {
        let linear = name.contains(".c_") && name.ends_with(".weight");
        let base = if linear { whole(base).unwrap() } else { base.copy() };
        match deltas.get(name.trim_end_matches(".weight")) {
            Some(delta) => assert!(relative(&merged[name], &(base.to_kind(Kind::Double) + delta)) < 1e-6),
            None => assert_eq!(merged[name], base, "{name}"),
        }
    }
    let refused = |_: &Tensor| -> Result<Tensor, Error> { Err(Error::Refused("no codes".to_owned())) };
    assert_eq!(case.merge(Precision::Fp32, false, Some(&refused)).unwrap_err().to_string(), "no codes");
}

#[test]
fn an_adapter_of_another_model_is_refused_by_tensor() {
    let case = Case::new(all(), None);
    let key = "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight";
    let mut other = Adapter { tensors: BTreeMap::new(), config: all(), metadata: BTreeMap::new() };
    other.tensors.extend(case.adapter.tensors.iter().map(|(key, tensor)| (key.clone(), tensor.copy())));
    other.tensors.insert(key.to_owned(), Tensor::ones([4, 65], (Kind::Float, tch::Device::Cpu)));
    other.write(&case.dir.path().join("adapter"), WriteDtype::F32).unwrap();
    let message = case.merge(Precision::Fp32, false, None).unwrap_err().to_string();
    assert!(message.contains(key) && message.contains("[4, 65]") && message.contains("[4, 64]"), "{message}");
    assert!(!case.out().exists());
}
