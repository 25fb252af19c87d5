//! Dataset, tokenizer and sequences as the training loop sees them.

use std::collections::{BTreeMap, HashSet};

use crate::data_support::{Workshop, documents, spec};
use tunefleet_proto::job::{FimLevel, Packing, SegmentFormat};
use tunefleet_worker::data::documents::{Dataset, Row};
use tunefleet_worker::data::render::{Layout, Markup, Renderer};
use tunefleet_worker::data::tokenizer::Tokenizer;
use tunefleet_worker::data::{IGNORED, Sequences, Split};

fn open(workshop: &Workshop, packing: Packing, level: FimLevel, split: Split) -> Sequences {
    let (dataset, tokenizer) = (workshop.dataset(), workshop.tokenizer());
    Sequences::open(&spec(packing, level), &dataset, &tokenizer, split, &workshop.cache()).unwrap()
}

fn count(tokens: impl IntoIterator<Item = u32>) -> BTreeMap<u32, u64> {
    let mut counts = BTreeMap::new();
    for token in tokens {
        *counts.entry(token).or_default() += 1;
    }
    counts
}

/// Tokens of all documents of a split, each with its end of text, and without markers.
fn corpus(workshop: &Workshop, split: Split) -> BTreeMap<u32, u64> {
    let tokenizer = Tokenizer::load(&workshop.tokenizer()).unwrap();
    let dataset = Dataset::open(&workshop.dataset()).unwrap();
    let texts = dataset.rows(split).flat_map(|rows| {
        let rows = rows.unwrap();
        (0..rows.len()).map(|row| rows.row(row).content.to_owned()).collect::<Vec<_>>()
    });
    count(texts.flat_map(|text| [tokenizer.encode_document(&text).unwrap(), vec![tokenizer.eos()]].concat()))
}

#[test]
fn every_token_of_the_validation_split_is_served_once() {
    let workshop = Workshop::standard();
    let markers: HashSet<u32> = [1, 2, 3, 4].into();
    for level in [FimLevel::Document, FimLevel::Window] {
        let sequences = open(&workshop, Packing::Continuous, level, Split::Validation);
        let all = (0..sequences.len_per_epoch()).flat_map(|i| sequences.sequence(i).unwrap().tokens);
        let served = count(all.filter(|token| !markers.contains(token)));
        assert_eq!(served, corpus(&workshop, Split::Validation));
    }
}

#[test]
fn every_token_of_the_training_split_is_served_once_per_epoch() {
    let workshop = Workshop::standard();
    let once = corpus(&workshop, Split::Train);
    let markers: HashSet<u32> = [1, 2, 3].into();
    for level in [FimLevel::Document, FimLevel::Window] {
        let mut spec = spec(Packing::Continuous, level);
        // One document per window and less: epoch borders show as multiples of the corpus.
        spec.sequence_tokens = 16;
        let sequences = Sequences::open(
            &spec,
            &workshop.dataset(),
            &workshop.tokenizer(),
            Split::Train,
            &workshop.cache(),
        )
        .unwrap();
        let mut seen: BTreeMap<u32, u64> = BTreeMap::new();
        let mut index = 0;
        for epoch in 1..=3u64 {
            let enough = |seen: &BTreeMap<u32, u64>| {
                once.iter().all(|(token, n)| seen.get(token).copied().unwrap_or(0) >= n * epoch)
            };
            while !enough(&seen) {
                for token in sequences.sequence(index).unwrap().tokens {
                    if !markers.contains(&token) {
                        *seen.entry(token).or_default() += 1;
                    }
                }
                index += 1;
            }
            // At most the window that crosses the border belongs to the next epoch.
            let excess: u64 = seen.iter().map(|(token, n)| n - once[token] * epoch).sum();
            assert!(excess < 16, "epoch {epoch}: {excess} tokens too many");
        }
    }
}

#[test]
fn a_sequence_does_not_depend_on_what_was_asked_before() {
    let workshop = Workshop::standard();
    for (packing, level) in [
        (Packing::Continuous, FimLevel::Document),
        (Packing::Continuous, FimLevel::Window),
        (Packing::SeedCompatible, FimLevel::Document),
    ] {
        let forward = open(&workshop, packing, level, Split::Train);
        let straight: Vec<_> = (0..150).map(|i| forward.sequence(i).unwrap()).collect();
        let jumping = open(&workshop, packing, level, Split::Train);
        for i in (0..150u64).rev().map(|i| (i * 37) % 150) {
            assert_eq!(jumping.sequence(i).unwrap(), straight[i as usize], "sequence {i}");
        }
    }
}

#[test]
fn targets_are_the_tokens_that_follow() {
    let workshop = Workshop::standard();
    let sequences = open(&workshop, Packing::Continuous, FimLevel::Window, Split::Train);
    for i in 0..100 {
        let sequence = sequences.sequence(i).unwrap();
        assert_eq!((sequence.tokens.len(), sequence.targets.len()), (48, 48));
        let shifted: Vec<i64> = sequence.tokens.iter().skip(1).map(|token| i64::from(*token)).collect();
        assert_eq!(sequence.targets[..47], shifted);
        assert_eq!(sequence.targets[47], IGNORED);
        assert!(sequence.tokens.iter().all(|token| u64::from(*token) < sequences.vocab_size()));
    }
}

#[test]
fn padding_takes_no_part_in_the_loss() {
    let workshop = Workshop::standard();
    let sequences = open(&workshop, Packing::Continuous, FimLevel::Document, Split::Validation);
    let last = sequences.sequence(sequences.len_per_epoch() - 1).unwrap();
    let real = last.tokens.iter().position(|token| *token == 4).expect("the last window is short");
    assert!(last.tokens[real..].iter().all(|token| *token == 4));
    assert!(last.targets[real - 1..].iter().all(|target| *target == IGNORED));
    assert!(last.targets[..real - 1].iter().all(|target| *target != IGNORED));
}

#[test]
fn what_follows_the_end_of_a_document_is_no_target_where_documents_are_apart() {
    let workshop = Workshop::standard();
    let at = |document_mask| {
        let spec =
            tunefleet_proto::job::DataSpec { document_mask, ..spec(Packing::Continuous, FimLevel::Window) };
        let (dataset, tokenizer) = (workshop.dataset(), workshop.tokenizer());
        Sequences::open(&spec, &dataset, &tokenizer, Split::Train, &workshop.cache()).unwrap()
    };
    let (together, apart) = (at(false), at(true));
    assert_eq!((together.keeps_apart(), apart.keeps_apart()), (false, true));
    let mut ends = 0;
    for i in 0..together.len_per_epoch() {
        let (together, apart) = (together.sequence(i).unwrap(), apart.sequence(i).unwrap());
        assert_eq!(together.tokens, apart.tokens);
        for ((token, together), apart) in together.tokens.iter().zip(together.targets).zip(apart.targets) {
            let is_end = *token == 0;
            assert_eq!(apart, if is_end { IGNORED } else { together });
            ends += usize::from(is_end);
        }
    }
    assert!(ends > 10, "{ends}");
}

#[test]
fn no_infill_is_cut_at_window_level() {
    let workshop = Workshop::standard();
    let sequences = open(&workshop, Packing::Continuous, FimLevel::Window, Split::Train);
    let mut infills = 0;
    for i in 0..200 {
        let tokens = sequences.sequence(i).unwrap().tokens;
        let markers: Vec<u32> = tokens.into_iter().filter(|token| [1, 2, 3].contains(token)).collect();
        assert_eq!(markers.len() % 3, 0, "window {i}: {markers:?}");
        assert!(markers.chunks(3).all(|infill| infill == [1, 3, 2]), "window {i}: {markers:?}");
        infills += markers.len() / 3;
    }
    assert!(infills > 50);
}

#[test]
fn splits_seeds_and_epochs_differ() {
    let workshop = Workshop::standard();
    let at = |seed| {
        let spec = tunefleet_proto::job::DataSpec { seed, ..spec(Packing::Continuous, FimLevel::Document) };
        let (dataset, tokenizer) = (workshop.dataset(), workshop.tokenizer());
        let sequences =
            Sequences::open(&spec, &dataset, &tokenizer, Split::Train, &workshop.cache()).unwrap();
        let epoch = sequences.len_per_epoch();
        let first: Vec<_> = (0..epoch).map(|i| sequences.sequence(i).unwrap().tokens).collect();
        let second: Vec<_> = (epoch..2 * epoch).map(|i| sequences.sequence(i).unwrap().tokens).collect();
        (first, second)
    };
    let (one, two) = (at(1), at(2));
    assert_ne!(one.0, two.0);
    assert_ne!(one.0, one.1);
}

#[test]
fn parquet_and_arrow_give_the_same_sequences() {
    let (train, validation) = (documents(10, 3), documents(2, 4));
    let [arrow, parquet] = [SegmentFormat::Arrow, SegmentFormat::Parquet].map(|format| {
        let workshop = Workshop::new(&train, &validation, format);
        let sequences = open(&workshop, Packing::Continuous, FimLevel::Document, Split::Train);
        (0..20).map(|i| sequences.sequence(i).unwrap()).collect::<Vec<_>>()
    });
    assert_eq!(arrow, parquet);
}

#[test]
fn openers_at_once_share_one_cache() {
    let workshop = Workshop::standard();
    let firsts: Vec<_> = std::thread::scope(|scope| {
        let opener = || {
            let sequences = open(&workshop, Packing::Continuous, FimLevel::Document, Split::Train);
            sequences.sequence(0).unwrap()
        };
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(opener)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(firsts.iter().all(|first| *first == firsts[0]));
    let names = std::fs::read_dir(workshop.cache()).unwrap();
    let mut extensions: Vec<_> =
        names.map(|name| name.unwrap().path().extension().unwrap().to_owned()).collect();
    extensions.sort();
    assert_eq!(extensions, ["lock", "tokens"]);
}

#[test]
fn a_damaged_cache_is_made_anew() {
    let workshop = Workshop::standard();
    let first = open(&workshop, Packing::Continuous, FimLevel::Document, Split::Train).sequence(0).unwrap();
    let mut names = std::fs::read_dir(workshop.cache()).unwrap().map(|name| name.unwrap().path());
    let path = names.find(|path| path.extension().unwrap() == "tokens").unwrap();
    let sound = std::fs::read(&path).unwrap();
    for damage in [sound.len() / 2, 3, 100] {
        let mut bytes = sound.clone();
        bytes[damage] ^= 0x40;
        std::fs::write(&path, &bytes[..]).unwrap();
        let again = open(&workshop, Packing::Continuous, FimLevel::Document, Split::Train);
        assert_eq!(again.sequence(0).unwrap(), first);
        assert_eq!(std::fs::read(&path).unwrap(), sound);
    }
    std::fs::write(&path, &sound[..sound.len() - 1]).unwrap();
    let again = open(&workshop, Packing::Continuous, FimLevel::Document, Split::Train);
    assert_eq!(again.sequence(0).unwrap(), first);
}

#[test]
fn a_split_without_files_is_refused_for_training_and_empty_for_validation() {
    let workshop = Workshop::new(&documents(5, 1), &[], SegmentFormat::Arrow);
    let validation = open(&workshop, Packing::Continuous, FimLevel::Document, Split::Validation);
    assert_eq!(validation.len_per_epoch(), 0);
    assert!(validation.sequence(0).is_err());
    let mut manifest = workshop.manifest();
    manifest.train.clear();
    workshop.write_manifest(&manifest);
    let spec = spec(Packing::Continuous, FimLevel::Document);
    let opened =
        Sequences::open(&spec, &workshop.dataset(), &workshop.tokenizer(), Split::Train, &workshop.cache());
    assert!(opened.unwrap_err().to_string().contains("no document"));
}

#[test]
fn marks_are_control_tokens_where_this_program_puts_them_and_text_where_a_file_spells_them_out() {
    let workshop = Workshop::standard();
    let tokenizer = Tokenizer::load(&workshop.tokenizer()).unwrap();
    let mut manifest = workshop.manifest();
    manifest.settings = serde_json::json!({"notebooks": "structured"});
    workshop.write_manifest(&manifest);
    let dataset = Dataset::open(&workshop.dataset()).unwrap();
    let tokens = |metadata_prefix, file_path, content| {
        let layout = Layout::Code { markup: Markup::Text, metadata_prefix };
        let renderer = Renderer::new(&dataset, &tokenizer, layout).unwrap();
        renderer.tokens(Row { repo_id: "a/b", file_path, content }).unwrap()
    };
    let prompt = |text: &str| tokenizer.encode_prompt(text).unwrap();
    let notebook = "<jupyter_start><jupyter_text>x<jupyter_code>y = 1<empty_output>";
    assert_eq!(tokens(false, "n.ipynb", notebook), prompt(notebook));
    let named = format!("<reponame>a/b<filename>n.ipynb\n{notebook}");
    assert_eq!(tokens(true, "n.ipynb", notebook), prompt(&named));
    assert_eq!(tokens(true, "a.py", "\ndef f()"), prompt("<reponame>a/b<filename>a.py\n\ndef f()"));
    // Spelt out by a file, or by its path.
    let spelt = "x <jupyter_code> <|endoftext|>";
    assert_eq!(tokens(false, "a.py", spelt), tokenizer.encode_document(spelt).unwrap());
    let controls = |tokens: Vec<u32>| tokens.iter().filter(|token| **token < 19).count();
    assert_eq!(controls(tokens(true, "<jupyter_code>.ipynb", "<jupyter_code>x <|endoftext|>")), 3);
}

#[test]
fn a_tokenizer_without_a_mark_that_is_needed_is_refused_with_the_setting() {
    let workshop = Workshop::standard();
    let path = workshop.tokenizer().join("tokenizer.json");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replace("<reponame>", "<other>")).unwrap();
    let mut spec = spec(Packing::Continuous, FimLevel::Window);
    spec.metadata_prefix = true;
    let opened =
        Sequences::open(&spec, &workshop.dataset(), &workshop.tokenizer(), Split::Train, &workshop.cache());
    let error = opened.unwrap_err().to_string();
    assert!(error.contains("<reponame>") && error.contains("data.metadata_prefix"), "{error}");
}
