use proptest::prelude::*;

use super::super::support::{adapter, config, deltas, model, relative};
use super::*;

const KEY: &str = "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight";
const B_KEY: &str = "base_model.model.transformer.h.0.attn.c_attn.lora_B.weight";

fn all(rank: u64) -> LoraConfig {
    config(rank, 16.0, &["c_attn", "c_proj", "c_fc"])
}

#[test]
fn an_adapter_comes_back_as_it_was_written() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("adapter");
    let mut original = adapter(LoraConfig {
        rslora: true,
        dora: true,
        modules_to_save: vec!["ln_f".to_owned()],
        rank_pattern: [("mlp.c_fc".to_owned(), 3)].into(),
        ..all(4)
    });
    original.metadata.insert(BASE_DIGEST_KEY.to_owned(), "ab".to_owned());
    original.write(&out, WriteDtype::F32).unwrap();
    let (again, plan) = read_for(&out, &model()).unwrap();
    assert_eq!((&again.config, &again.metadata), (&original.config, &original.metadata));
    assert_eq!(again.tensors.len(), plan.linears.len() * 3 + 2);
    for (name, tensor) in &original.tensors {
        assert_eq!(&again.tensors[name], tensor, "{name}");
    }
    assert_eq!(
        again.saved().map(|(_, name, _)| name).collect::<Vec<_>>(),
        ["transformer.ln_f.bias", "transformer.ln_f.weight"]
    );
    original.write(&out, WriteDtype::Bf16).unwrap();
    let rounded = read(&out).unwrap();
    for (module, delta) in deltas(&original) {
        assert!(relative(&deltas(&rounded)[&module], &delta) < 0.01);
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn modules_come_in_the_order_of_blocks() {
    let mut names = ["h.10.a", "h.2.a", "h.2.b", "h.1.b"];
    names.sort_by_cached_key(|name| natural(name));
    assert_eq!(names, ["h.1.b", "h.2.a", "h.2.b", "h.10.a"]);
}

/// Writes an adapter after `spoil`, without any check, and reads it for the model.
fn message(config: LoraConfig, spoil: impl FnOnce(&mut Adapter)) -> String {
    let dir = tempfile::tempdir().unwrap();
    let mut adapter = adapter(config);
    spoil(&mut adapter);
    adapter.fill(dir.path(), WriteDtype::F32).unwrap();
    read_for(dir.path(), &model()).unwrap_err().to_string()
}

#[test]
fn what_does_not_fit_is_refused_by_tensor_and_rule() {
    let randn = |shape: &[i64]| Tensor::randn(shape, (Kind::Float, Device::Cpu));
    type Spoil = Box<dyn FnOnce(&mut Adapter)>;
    let replace = |key: &'static str, tensor: Tensor| -> Spoil {
        Box::new(move |adapter: &mut Adapter| {
            adapter.tensors.insert(key.to_owned(), tensor);
        })
    };
    let cases: Vec<(Spoil, &[&str])> = vec![
        (Box::new(|adapter: &mut Adapter| drop(adapter.tensors.remove(KEY))), &[KEY, "is missing"]),
        (
            Box::new(|adapter: &mut Adapter| adapter.tensors.retain(|key, _| !key.contains("h.1.mlp.c_fc"))),
            &["h.1.mlp.c_fc.lora_A.weight", "is missing", "the model ask for it"],
        ),
        (
            replace("base_model.model.transformer.h.9.attn.c_attn.lora_A.weight", randn(&[4, 64])),
            &["h.9.attn.c_attn", "is missing"],
        ),
        (replace("base_model.model.transformer.ln_f.weight", randn(&[64])), &["modules_to_save"]),
        (replace("base_model.model.transformer.wte.lora_embedding_A", randn(&[4, 50])), &["not supported"]),
        (
            replace("transformer.h.0.attn.c_attn.lora_A.weight", randn(&[4, 64])),
            &["begin with base_model.model."],
        ),
        (replace(KEY, randn(&[5, 64])), &[KEY, "rank 5", "adapter_config.json says 4"]),
        (replace(KEY, randn(&[4, 63])), &[KEY, "[4, 63]", "[4, 64]"]),
        (replace(B_KEY, randn(&[96])), &[B_KEY, "[96]", "2 dimensions"]),
        (replace(KEY, randn(&[4, 64]) * f64::NAN), &[KEY, "not finite"]),
        (
            replace("base_model.model.transformer.h.0.attn.c_attn.lora_magnitude_vector", randn(&[96])),
            &["use_dora: false"],
        ),
    ];
    for (spoil, expected) in cases {
        let message = message(all(4), spoil);
        for part in expected {
            assert!(message.contains(part), "{part}: {message}");
        }
    }
    let other = message(all(4), |adapter| adapter.config.targets = config(4, 1.0, &["c_attn"]).targets);
    assert!(other.contains("no module that target_modules [c_attn] name"), "{other}");
    let nothing = message(all(4), |adapter| adapter.config.targets = config(4, 1.0, &["q_proj"]).targets);
    assert!(nothing.contains("q_proj"), "{nothing}");
}

#[test]
fn a_directory_that_is_no_adapter_is_refused_with_a_hint() {
    let dir = tempfile::tempdir().unwrap();
    let message = |path: &Path| read(path).unwrap_err().to_string();
    assert!(message(&dir.path().join("absent")).contains("there is no such directory"));
    assert!(message(dir.path()).contains("it is not an adapter"));
    adapter(all(2)).write(&dir.path().join("mine"), WriteDtype::F32).unwrap();
    assert!(message(dir.path()).contains(&format!("try {}", dir.path().join("mine").display())));
    let pickled = dir.path().join("pickled");
    fs::create_dir(&pickled).unwrap();
    fs::write(pickled.join(CONFIG_FILE), "{}").unwrap();
    fs::write(pickled.join("adapter_model.bin"), "").unwrap();
    assert!(message(&pickled).contains("pickle"));
}

#[test]
fn nothing_but_an_adapter_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("thesis.tex"), "mine").unwrap();
    let message = adapter(all(2)).write(dir.path(), WriteDtype::F32).unwrap_err().to_string();
    assert!(message.contains("thesis.tex, which would be lost"), "{message}");
    let bad = adapter(all(2));
    let _ = bad.tensors[KEY].shallow_clone().fill_(f64::INFINITY);
    let message = bad.write(&dir.path().join("new"), WriteDtype::F32).unwrap_err().to_string();
    assert!(message.contains(KEY) && message.contains("not finite"), "{message}");
    assert!(!dir.path().join("new").exists());
}

/// A safetensors file of any header over any bytes.
fn file(header: &str, data: &[u8]) -> Vec<u8> {
    let mut out = (header.len() as u64).to_le_bytes().to_vec();
    out.extend_from_slice(header.as_bytes());
    out.extend_from_slice(data);
    out
}

proptest! {
    #[test]
    fn arbitrary_files_never_panic(
        settings in "\\{(\"(r|lora_alpha|target_modules|rank_pattern|use_dora|modules_to_save)\":(1|-2|0.5|true|null|\"all-linear\"|\"\\(\"|\\[\"c_attn\"\\]|\\{\"a\":1\\}),?){0,4}\\}",
        name in "base_model\\.model\\.[a-z.]{0,12}(c_attn)?\\.(lora_A|lora_B)?\\.?(weight)?",
        shape in "[0-9]{1,20}(,[0-9]{1,20}){0,2}",
        end in 0u64..80,
        data in proptest::collection::vec(any::<u8>(), 0..80),
    ) {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(CONFIG_FILE), settings.replace(",}", "}")).unwrap();
        let header = format!(r#"{{"{name}":{{"dtype":"F32","shape":[{shape}],"data_offsets":[0,{end}]}}}}"#);
        fs::write(dir.path().join(WEIGHTS_FILE), file(&header, &data)).unwrap();
        let _ = read(dir.path());
        let _ = read_for(dir.path(), &model());
        let _ = super::super::inspect::inspect(dir.path());
    }

    #[test]
    fn small_shapes_over_right_bytes_never_panic(
        rank in 0u64..4,
        rows in 0usize..5,
        columns in 0usize..5,
        part in "(lora_A\\.weight|lora_B\\.weight|lora_magnitude_vector)",
        flat in any::<bool>(),
        bits in any::<u32>(),
    ) {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(CONFIG_FILE), format!(r#"{{"r":{rank}}}"#)).unwrap();
        let shape = if flat { format!("{}", rows * columns) } else { format!("{rows},{columns}") };
        let bytes = rows * columns * 4;
        let one = |part: &str| {
            format!(r#""base_model.model.c_attn.{part}":{{"dtype":"F32","shape":[{shape}],"data_offsets":[0,{bytes}]}}"#)
        };
        let header = format!("{{{}}}", one(&part));
        let data: Vec<u8> = bits.to_le_bytes().into_iter().cycle().take(bytes).collect();
        fs::write(dir.path().join(WEIGHTS_FILE), file(&header, &data)).unwrap();
        let _ = read(dir.path());
        let _ = super::super::inspect::inspect(dir.path());
    }
}
