//! Files that are not what they should be: refused with their name, never a panic.

use std::path::Path;

use crate::data_support::{Workshop, documents, spec};
use proptest::prelude::*;
use tunefleet_proto::digest_hex;
use tunefleet_proto::job::{FimLevel, Packing, SegmentFormat};
use tunefleet_worker::data::documents::Dataset;
use tunefleet_worker::data::tokenizer::Tokenizer;
use tunefleet_worker::data::{Error, Sequences, Split};

fn open(workshop: &Workshop) -> Result<Sequences, Error> {
    let spec = spec(Packing::Continuous, FimLevel::Document);
    Sequences::open(&spec, &workshop.dataset(), &workshop.tokenizer(), Split::Train, &workshop.cache())
}

fn refusal(workshop: &Workshop) -> String {
    open(workshop).unwrap_err().to_string()
}

#[test]
fn a_truncated_segment_is_refused_by_name() {
    let workshop = Workshop::standard();
    let path = workshop.dataset().join("train-00002.arrow");
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    let message = refusal(&workshop);
    assert!(message.contains("train-00002.arrow"), "{message}");
    assert!(message.contains(&format!("{} bytes, the manifest says {}", bytes.len() / 2, bytes.len())));
    assert!(message.ends_with("restore this file or collect the dataset again"));
}

#[test]
fn an_altered_segment_is_refused_by_name() {
    let workshop = Workshop::standard();
    let path = workshop.dataset().join("train-00001.arrow");
    let mut bytes = std::fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    let message = refusal(&workshop);
    assert!(message.contains("train-00001.arrow: SHA-256 is"), "{message}");
}

#[test]
fn a_missing_segment_is_refused_by_name() {
    let workshop = Workshop::standard();
    std::fs::remove_file(workshop.dataset().join("train-00000.arrow")).unwrap();
    let message = refusal(&workshop);
    assert!(message.contains("train-00000.arrow: No such file"), "{message}");
}

#[test]
fn a_segment_with_another_number_of_rows_is_refused() {
    for rows in [2, 4] {
        let workshop = Workshop::standard();
        let mut manifest = workshop.manifest();
        manifest.train[3].rows = rows;
        workshop.write_manifest(&manifest);
        let message = refusal(&workshop);
        assert!(message.contains("train-00003.arrow") && message.contains("rows"), "{message}");
    }
}

#[test]
fn a_manifest_cannot_name_files_elsewhere() {
    for file in ["../train-00000.arrow", "/etc/passwd", "a/b.arrow", "", ".."] {
        let workshop = Workshop::standard();
        let mut manifest = workshop.manifest();
        manifest.train[0].file = file.to_owned();
        workshop.write_manifest(&manifest);
        let message = refusal(&workshop);
        assert!(message.contains("is not a plain file name"), "{message}");
    }
}

#[test]
fn a_manifest_of_another_version_is_refused() {
    let workshop = Workshop::standard();
    let mut manifest = workshop.manifest();
    manifest.version = 99;
    workshop.write_manifest(&manifest);
    assert!(refusal(&workshop).contains("manifest.json: version 99, this build reads 1"));
}

#[test]
fn a_tokenizer_without_fim_tokens_is_refused_by_name() {
    let workshop = Workshop::standard();
    let path = workshop.tokenizer().join("tokenizer.json");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replace("<fim_suffix>", "<other>")).unwrap();
    let message = refusal(&workshop);
    assert!(message.contains(path.to_str().unwrap()), "{message}");
    assert!(message.contains("<fim_suffix> must each be one special token"), "{message}");
    assert!(!message.contains("<fim_prefix>"), "{message}");

    let mut without = spec(Packing::Continuous, FimLevel::Document);
    without.fim_rate = 0.0;
    let opened =
        Sequences::open(&without, &workshop.dataset(), &path, Split::Train, &workshop.cache()).unwrap();
    assert!(opened.sequence(0).is_ok(), "no infilling, no markers needed");
}

#[test]
fn a_tokenizer_without_end_of_text_is_refused() {
    let workshop = Workshop::standard();
    let path = workshop.tokenizer().join("tokenizer.json");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replace("<|endoftext|>", "<other>")).unwrap();
    assert!(refusal(&workshop).contains("end-of-text token `<|endoftext|>` is not in the vocabulary"));
}

#[test]
fn settings_out_of_range_are_refused() {
    let workshop = Workshop::standard();
    let refusal = |change: fn(&mut tunefleet_proto::job::DataSpec)| {
        let mut spec = spec(Packing::SeedCompatible, FimLevel::Document);
        change(&mut spec);
        let (dataset, tokenizer) = (workshop.dataset(), workshop.tokenizer());
        let opened = Sequences::open(&spec, &dataset, &tokenizer, Split::Train, &workshop.cache());
        opened.unwrap_err().to_string()
    };
    assert!(refusal(|spec| spec.fim_rate = 1.5).starts_with("data.fim_rate: must lie between 0 and 1"));
    assert!(refusal(|spec| spec.fim_spm_rate = f64::NAN).starts_with("data.fim_spm_rate"));
    assert!(refusal(|spec| spec.sequence_tokens = 1).starts_with("data.sequence_tokens"));
    assert!(refusal(|spec| spec.fim_level = FimLevel::Window).starts_with("data.fim_level"));
    assert!(refusal(|spec| spec.seed = 1 << 32).starts_with("data.seed: must fit 32 bits"));
}

#[test]
fn a_cache_that_cannot_be_written_is_named() {
    let workshop = Workshop::standard();
    std::fs::write(workshop.cache(), "a file where a directory should be").unwrap();
    let message = refusal(&workshop);
    assert!(message.contains(workshop.cache().to_str().unwrap()), "{message}");
}

/// Gives the first training segment these bytes, with a manifest that vouches for them.
fn plant(workshop: &Workshop, bytes: &[u8]) {
    let mut manifest = workshop.manifest();
    let segment = &mut manifest.train[0];
    std::fs::write(workshop.dataset().join(&segment.file), bytes).unwrap();
    segment.bytes = bytes.len() as u64;
    segment.sha256 = digest_hex(bytes);
    workshop.write_manifest(&manifest);
}

/// Reads everything; any result will do, a panic will not.
fn read_all(dataset: &Path) -> bool {
    Dataset::open(dataset).is_ok_and(|dataset| dataset.rows(Split::Train).all(|batch| batch.is_ok()))
}

/// `bytes` with some of them replaced, at places and by values from `edits`.
fn mutate(bytes: &[u8], edits: &[(prop::sample::Index, u8)]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for (place, value) in edits {
        let place = place.index(bytes.len());
        bytes[place] = *value;
    }
    bytes
}

fn edits() -> impl Strategy<Value = Vec<(prop::sample::Index, u8)>> {
    prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)
}

#[test]
fn malformed_segments_do_not_panic() {
    for format in [SegmentFormat::Arrow, SegmentFormat::Parquet] {
        let workshop = Workshop::new(&documents(4, 1), &[], format);
        let sound = std::fs::read(workshop.dataset().join(&workshop.manifest().train[0].file)).unwrap();
        assert!(read_all(&workshop.dataset()));
        let config = ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() };
        proptest!(config, |(edits in edits(), noise in prop::collection::vec(any::<u8>(), 0..200))| {
            plant(&workshop, &mutate(&sound, &edits));
            read_all(&workshop.dataset());
            plant(&workshop, &noise);
            prop_assert!(!read_all(&workshop.dataset()));
        });
    }
}

#[test]
fn malformed_tokenizers_do_not_panic() {
    let workshop = Workshop::standard();
    let path = workshop.tokenizer().join("tokenizer.json");
    let sound = std::fs::read(&path).unwrap();
    let config = ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() };
    proptest!(config, |(edits in edits(), noise in prop::collection::vec(any::<u8>(), 0..200))| {
        std::fs::write(&path, mutate(&sound, &edits)).unwrap();
        if let Ok(tokenizer) = Tokenizer::load(&path) {
            let _ = tokenizer.encode_document("def f(x): return 10 <fim_prefix>");
            let _ = tokenizer.decode(&[0, 5, 250, 319, u32::MAX], false);
        }
        std::fs::write(&path, &noise).unwrap();
        prop_assert!(Tokenizer::load(&path).is_err());
    });
}
