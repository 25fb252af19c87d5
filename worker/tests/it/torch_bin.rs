//! Weights that torch.save wrote, read as those of safetensors files are.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use proptest::prelude::*;
use tch::Device;
use tunefleet_proto::ids::Rank;
use tunefleet_proto::job::{Offload, Optimizer, Precision};
use tunefleet_proto::shard_plan::ShardPlan;
use tunefleet_worker::checkpoint::hugging_face::{self, ModelFiles};
use tunefleet_worker::checkpoint::torch_zip::{ReadAt, Reader};
use tunefleet_worker::comm::Mesh;
use tunefleet_worker::comm::simulated::Simulated;
use tunefleet_worker::model::numerics::Numerics;
use tunefleet_worker::train::units;
use tunefleet_worker::train::walk::Batch;

use crate::common::{KEEP, SOLO, fixtures_of, loss_and_grads, python, run_python, walk};

const PROGRAM: &str = "tests/parity/make_bin_fixtures.py";

fn fixtures() -> Option<PathBuf> {
    fixtures_of("make_bin_fixtures.py", "bin")
}

/// Names of the models in the fixtures.
fn models(fixtures: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(fixtures.join("index.json")).unwrap();
    let index: serde_json::Value = serde_json::from_str(&text).unwrap();
    index["models"].as_array().unwrap().iter().map(|name| name.as_str().unwrap().to_owned()).collect()
}

/// Bits of every parameter of the model in `dir`.
fn bits(dir: &Path) -> BTreeMap<String, Vec<u32>> {
    let config = hugging_face::read_config(dir).unwrap();
    let files = ModelFiles::open(dir).unwrap();
    files.check(dir, &config).unwrap();
    let plan = ShardPlan::new(&config, 1);
    let slots = plan.units.iter().flat_map(|unit| &unit.parameters);
    let read = |name: &String| {
        let mut bits = Vec::new();
        let _ = files.read(dir, name, |values| bits.extend(values.iter().map(|v| v.to_bits()))).unwrap();
        (name.clone(), bits)
    };
    slots.map(|slot| read(&slot.hf_name)).collect()
}

#[test]
fn every_tensor_equals_that_of_the_safetensors_file_bit_for_bit() {
    let Some(fixtures) = fixtures() else { return };
    for model in models(&fixtures) {
        let dir = fixtures.join(&model);
        let (torch, safetensors) = (bits(&dir.join("bin")), bits(&dir.join("safetensors")));
        assert!(torch.values().flatten().any(|&bits| bits != 0), "{model}");
        assert_eq!(torch, safetensors, "{model}");
    }
}

#[test]
fn shards_and_the_first_loss_are_those_of_the_safetensors_file() {
    let Some(fixtures) = fixtures() else { return };
    let numerics = Numerics::new(Device::Cpu, Precision::Fp32);
    for model in models(&fixtures) {
        let dirs = ["bin", "safetensors"].map(|format| fixtures.join(&model).join(format));
        let config = hugging_face::read_config(&dirs[0]).unwrap();
        let plan = ShardPlan::new(&config, 3);
        for rank in 0..3 {
            let third = Simulated::new(Rank { rank, world: 3 }, None);
            let mesh = Mesh::sharded(&third);
            let [a, b] = [0, 1].map(|i: usize| {
                let shards =
                    units::shards(&plan, rank, numerics, Optimizer::AdamW, Offload::None, numerics.kind)
                        .unwrap();
                hugging_face::load(&dirs[i], &plan, mesh, &shards).unwrap();
                shards
            });
            for (unit, (a, b)) in a.iter().zip(&b).enumerate() {
                assert!(a.master.equal(&b.master), "{model}: rank {rank}, unit {unit}");
            }
        }
        let tokens_bt = tch::Tensor::arange(40, (tch::Kind::Int64, Device::Cpu)).view([2, 20]);
        let batch = Batch::new(tokens_bt.shallow_clone(), &tokens_bt + 1);
        let losses = dirs.map(|dir| {
            let mut walk = walk(&dir, Precision::Fp32, SOLO, KEEP, |_| ());
            loss_and_grads(&mut walk, &batch).0
        });
        assert!(losses[0].is_finite() && losses[0] > 0.0, "{losses:?}");
        assert_eq!(losses[0].to_bits(), losses[1].to_bits(), "{model}: {losses:?}");
    }
}

#[test]
fn safetensors_files_are_preferred() {
    let Some(fixtures) = fixtures() else { return };
    let dir = tempfile::tempdir().unwrap();
    for (model, format, file) in
        [("fp32", "bin", "pytorch_model.bin"), ("fp32-views", "safetensors", "model.safetensors")]
    {
        std::fs::copy(fixtures.join(model).join(format).join(file), dir.path().join(file)).unwrap();
        std::fs::copy(fixtures.join("fp32/bin/config.json"), dir.path().join("config.json")).unwrap();
        assert_eq!(bits(dir.path()), bits(&fixtures.join(model).join("safetensors")));
    }
}

/// A file in memory that counts what is read of it.
struct Counted {
    file: Vec<u8>,
    bytes_read: Arc<AtomicU64>,
}

impl ReadAt for Counted {
    fn bytes(&self) -> io::Result<u64> {
        self.file.bytes()
    }

    fn read_exact_at(&self, into: &mut [u8], offset: u64) -> io::Result<()> {
        self.bytes_read.fetch_add(into.len() as u64, Ordering::Relaxed);
        self.file.read_exact_at(into, offset)
    }
}

#[test]
fn a_rank_of_four_reads_a_quarter_of_the_weights() {
    let Some(fixtures) = fixtures() else { return };
    let dir = fixtures.join("fp32/bin");
    let config = hugging_face::read_config(&dir).unwrap();
    let plan = ShardPlan::new(&config, 4);
    let parameters = plan.units.iter().flat_map(|unit| &unit.parameters);
    let weights_bytes = parameters.map(|slot| slot.elements() * 4).sum::<u64>();
    let path = dir.join("pytorch_model.bin");
    let mut all_bytes = 0;
    for rank in 0..4 {
        let bytes_read = Arc::new(AtomicU64::new(0));
        let source = Counted { file: std::fs::read(&path).unwrap(), bytes_read: Arc::clone(&bytes_read) };
        let reader = Reader::new(&path, Box::new(source)).unwrap();
        // The directory and the pickle, whose length is the number of tensors' and not their sizes'.
        let opening_bytes = bytes_read.swap(0, Ordering::Relaxed);
        assert!(opening_bytes < 20_000, "{opening_bytes}");
        let pieces = plan.units.iter().flat_map(|unit| unit.pieces(rank, 4));
        let (mut needed_bytes, mut count) = (0, 0);
        for piece in pieces {
            reader.read_f32(&piece.slot.hf_name, piece.range.clone(), |_, _| ()).unwrap();
            needed_bytes += (piece.range.end - piece.range.start) * 4;
            count += 1;
        }
        // Beside its elements, the 30 bytes before each storage.
        assert_eq!(bytes_read.load(Ordering::Relaxed), needed_bytes + count * 30);
        // Parameters are padded, so that a range can begin or end in between.
        assert!(needed_bytes * 4 <= weights_bytes + weights_bytes / 20, "{needed_bytes}");
        all_bytes += needed_bytes;
    }
    assert_eq!(all_bytes, weights_bytes);
}

#[test]
fn tensors_beyond_four_gigabytes_are_read() {
    let Some(python) = python() else { return };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("wide.bin");
    run_python(&python, &[PROGRAM, "--wide", path.to_str().unwrap()]);
    let reader = Reader::open(&path).unwrap();
    let elements = reader.shape("weight").unwrap()[0];
    assert!(elements * 2 > 1 << 32);
    for (name, end) in [("weight", elements), ("after", 3)] {
        let mut last = Vec::new();
        reader.read_f32(name, end - 3..end, |_, values| last.extend_from_slice(values)).unwrap();
        assert_eq!(last, [1.5, -0.25, 3.0], "{name}");
    }
}

/// What reading `file`, as a whole, says.
fn refusal(file: &Path) -> String {
    let error = Reader::open(file).and_then(|reader| {
        let names: Vec<String> = reader.names().map(str::to_owned).collect();
        names.iter().try_for_each(|name| {
            let elements = reader.shape(name).unwrap().iter().product();
            reader.read_f32(name, 0..elements, |_, _| ())
        })
    });
    error.unwrap_err().to_string()
}

#[test]
fn files_that_cannot_be_read_say_why_and_what_to_do() {
    let Some(fixtures) = fixtures() else { return };
    for (case, says) in [
        ("legacy", ["before 1.6", "torch.save(torch.load("]),
        ("strided", ["tensor weight: is strided", ".contiguous()"]),
        ("integers", ["tensor weight: lies in a LongStorage", "only fp32, bf16 and fp16"]),
        ("wrapped", ["entry \"state_dict\" is a dict", "torch.save(model.state_dict()"]),
        ("system", ["posix.system", "not executed"]),
        ("getattr", [".getattr", "not executed"]),
        ("module", ["torch.nn.modules.linear.Linear", "torch.save(model.state_dict()"]),
        ("big-endian", ["byte order \"big\"", "not little"]),
        ("compressed", ["is compressed", "load the file with torch and save it again"]),
    ] {
        let file = fixtures.join(format!("refused/{case}.bin"));
        let message = refusal(&file);
        assert!(message.starts_with(file.to_str().unwrap()), "{message}");
        says.iter().for_each(|part| assert!(message.contains(part), "{case}: {message}"));
    }
    assert!(!fixtures.join("refused/was-executed").exists() && !Path::new("was-executed").exists());
}

/// Opens bytes as a file and reads all of it.
fn read_all(bytes: Vec<u8>) -> Result<(), String> {
    let reader = Reader::new(Path::new("x.bin"), Box::new(bytes)).map_err(|e| e.to_string())?;
    let names: Vec<String> = reader.names().map(str::to_owned).collect();
    for name in names {
        let elements = reader.shape(&name).unwrap().iter().product();
        reader.read_f32(&name, 0..elements, |_, _| ()).map_err(|e| e.to_string())?;
    }
    Ok(())
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let Some(fixtures) = fixtures() else { return };
    let bytes = std::fs::read(fixtures.join("refused/plain.bin")).unwrap();
    read_all(bytes.clone()).unwrap();
    for len in 0..bytes.len() {
        let message = read_all(bytes[..len].to_vec()).unwrap_err();
        assert!(message.starts_with("x.bin: "), "cut at {len}: {message}");
    }
}

#[test]
fn a_file_with_any_one_byte_changed_never_panics() {
    let Some(fixtures) = fixtures() else { return };
    let bytes = std::fs::read(fixtures.join("refused/plain.bin")).unwrap();
    for at in 0..bytes.len() {
        for byte in [0x00, 0x01, 0x7f, 0xff, !bytes[at]] {
            let mut changed = bytes.clone();
            changed[at] = byte;
            let _ = read_all(changed);
        }
    }
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        let _ = read_all(bytes);
    }

    /// An archive's end with arbitrary numbers, over arbitrary bytes.
    #[test]
    fn arbitrary_directories_never_panic(
        mut bytes in proptest::collection::vec(any::<u8>(), 0..400),
        entries: u16, directory_bytes in 0u32..500, offset in 0u32..500, wide: bool, wide_offset in 0u64..500,
    ) {
        if wide {
            let record = bytes.len() as u64;
            bytes.extend(b"PK\x06\x06");
            bytes.extend([0; 28]);
            bytes.extend(u64::from(entries).to_le_bytes());
            bytes.extend(u64::from(directory_bytes).to_le_bytes());
            bytes.extend(wide_offset.to_le_bytes());
            bytes.extend(b"PK\x06\x07\0\0\0\0");
            bytes.extend(record.to_le_bytes());
            bytes.extend([1, 0, 0, 0]);
        }
        bytes.extend(b"PK\x05\x06\0\0\0\0");
        bytes.extend(entries.to_le_bytes());
        bytes.extend(if wide { u16::MAX } else { entries }.to_le_bytes());
        bytes.extend(directory_bytes.to_le_bytes());
        bytes.extend(offset.to_le_bytes());
        bytes.extend([0, 0]);
        let _ = read_all(bytes);
    }
}
