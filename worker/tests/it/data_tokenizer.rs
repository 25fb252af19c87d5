//! The tokenizer: published vectors, control tokens, training, and what transformers makes of it.

use std::process::Command;

use crate::data_support::{Workshop, documents, python, shared_data};
use tunefleet_worker::data::tokenizer::Tokenizer;
use tunefleet_worker::data::train_tokenizer::{SPECIAL_TOKENS, train};
use tunefleet_worker::generate::prompt::{FILL_ME, InfillOrder, Prompt, infill};
use tunefleet_worker::serve::engine::text::Text;

/// Texts with what plain byte pairs, digits, spaces and control tokens need.
const TEXTS: [&str; 6] = [
    "from ..config import x",
    "  a  b   c\n\n\t\tindent ( spaces , kept )",
    "2024 + 10000 = 12024",
    "gr\u{f6}\u{df}e \u{6ce8}\u{91ca} \u{1f999}\u{200b}",
    "",
    "\r\n !?.",
];

#[test]
fn the_published_vectors_of_starcoder_are_reproduced() {
    let (Some(tokenizer), Some(texts), Some(ids)) = (
        shared_data("starcoder.tokenizer.json"),
        shared_data("tokenizer-vectors/refact.inp"),
        shared_data("tokenizer-vectors/refact.out"),
    ) else {
        return;
    };
    let tokenizer = Tokenizer::load(&tokenizer).unwrap();
    let texts = std::fs::read_to_string(texts).unwrap();
    let texts: Vec<&str> = texts.split_terminator("\n__ggml_vocab_test__\n").collect();
    let ids = std::fs::read_to_string(ids).unwrap();
    let ids: Vec<Vec<u32>> =
        ids.lines().map(|line| line.split_whitespace().map(|id| id.parse().unwrap()).collect()).collect();
    assert_eq!((texts.len(), ids.len()), (46, 46));
    for (text, ids) in texts.iter().zip(&ids) {
        assert_eq!(tokenizer.encode_document(text).unwrap(), *ids, "{text:?}");
        assert_eq!(tokenizer.decode(ids, false).unwrap(), *text);
    }
    assert_eq!(tokenizer.vocab_size(), 49_152);
    let prompt = tokenizer.encode_prompt("<fim_prefix>a<fim_suffix>b<fim_middle>").unwrap();
    assert_eq!([prompt[0], prompt[2], prompt[4]], [1, 3, 2]);
    let fim = tokenizer.fim().unwrap();
    assert_eq!([tokenizer.eos(), fim.prefix, fim.middle, fim.suffix, fim.pad.unwrap()], [0, 1, 2, 3, 4]);
}

#[test]
fn a_marker_spelt_out_in_a_file_is_text_and_in_a_prompt_control() {
    let workshop = Workshop::standard();
    let tokenizer = Tokenizer::load(&workshop.tokenizer()).unwrap();
    for (id, token) in SPECIAL_TOKENS.into_iter().enumerate() {
        let text = format!("x = '{token}'");
        let document = tokenizer.encode_document(&text).unwrap();
        assert!(document.iter().all(|id| *id as usize >= SPECIAL_TOKENS.len()), "{token}: {document:?}");
        assert_eq!(tokenizer.decode(&document, true).unwrap(), text);
        assert!(tokenizer.encode_prompt(&text).unwrap().contains(&(id as u32)));
        assert!(tokenizer.encode_document_as_seed(&text).unwrap().contains(&(id as u32)));
        assert_eq!(tokenizer.encode_prompt(token).unwrap(), [id as u32]);
    }
}

#[test]
fn markers_not_declared_special_are_still_text_in_a_file() {
    let workshop = Workshop::standard();
    let path = workshop.tokenizer().join("tokenizer.json");
    let declared = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, declared.replace("\"special\": true", "\"special\": false")).unwrap();
    let tokenizer = Tokenizer::load(&path).unwrap();
    assert!(tokenizer.encode_document("<fim_prefix>").unwrap().len() > 1);
    assert_eq!(tokenizer.encode_prompt("<fim_prefix>").unwrap(), [1]);
}

#[test]
fn decoding_gives_back_every_text() {
    let workshop = Workshop::standard();
    let tokenizer = Tokenizer::load(&workshop.tokenizer()).unwrap();
    for text in TEXTS.into_iter().map(str::to_owned).chain(documents(20, 9)) {
        let tokens = tokenizer.encode_document(&text).unwrap();
        assert_eq!(tokenizer.decode(&tokens, false).unwrap(), text);
    }
}

#[test]
fn digits_stand_alone() {
    let workshop =
        Workshop::new(&["12345 12345 12345".repeat(50)], &[], tunefleet_proto::job::SegmentFormat::Arrow);
    let tokenizer = Tokenizer::load(&workshop.tokenizer()).unwrap();
    assert_eq!(tokenizer.encode_document("12345").unwrap().len(), 5);
}

#[test]
fn the_same_texts_give_the_same_vocabulary() {
    let dir = tempfile::tempdir().unwrap();
    let texts = documents(40, 5);
    let [one, two] = ["one", "two"].map(|name| {
        let out = dir.path().join(name);
        assert_eq!(train(texts.iter().cloned(), 330, &out).unwrap(), 330);
        ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
            .map(|file| std::fs::read(out.join(file)).unwrap())
    });
    assert_eq!(one, two);
}

#[test]
fn a_vocabulary_without_room_for_bytes_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let error = train(std::iter::once("text".to_owned()), 274, dir.path()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "a vocabulary of 274 tokens is too small; special tokens and bytes alone are 275, raise it"
    );
}

#[test]
fn transformers_loads_a_trained_tokenizer_and_agrees() {
    let workshop = Workshop::standard();
    let directory = workshop.tokenizer();
    let directory = directory.to_str().unwrap();
    let texts = serde_json::to_string(&TEXTS).unwrap();
    let Some(output) = python("load_tokenizer.py", &[directory, &texts]) else { return };
    let output: serde_json::Value = serde_json::from_str(&output).unwrap();
    let tokenizer = Tokenizer::load(&workshop.tokenizer()).unwrap();
    for class in ["AutoTokenizer", "GPT2TokenizerFast"] {
        let seen = &output[class];
        for (text, ids) in TEXTS.iter().zip(seen["ids"].as_array().unwrap()) {
            let ours = tokenizer.encode_prompt(text).unwrap();
            assert_eq!(*ids, serde_json::json!(ours), "{class} on {text:?}");
        }
        assert_eq!(seen["decoded"], serde_json::json!(TEXTS), "{class}");
        assert_eq!(seen["special"], serde_json::json!([0, 1, 2, 3, 4]), "{class}");
        assert_eq!(seen["length"], 320, "{class}");
    }
}

#[test]
fn the_command_trains_on_a_dataset() {
    let workshop = Workshop::standard();
    let out = workshop.dir.path().join("trained");
    let output = Command::new(env!("CARGO_BIN_EXE_worker"))
        .args(["tokenizer", "train", "--vocab-size", "300", "--dataset"])
        .arg(workshop.dataset())
        .arg("--out")
        .arg(&out)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let path = out.join("tokenizer.json");
    assert_eq!(String::from_utf8(output.stdout).unwrap(), format!("{}\n", path.display()));
    assert_eq!(Tokenizer::load(&out).unwrap().vocab_size(), 300);
}

/// Qwen's, DeepSeek's and Code Llama's ways: other marks, a beginning of text, a space that a text begins with.
#[test]
fn prompts_are_laid_out_as_each_family_has_them() {
    let Some(dir) = crate::common::fixtures_of("make_tokenizers.py", "tokenizers") else { return };
    for family in ["qwen", "deepseek", "codellama"] {
        let tokenizer = Tokenizer::load(&dir.join(family)).unwrap();
        let cases = std::fs::read_to_string(dir.join(family).join("cases.json")).unwrap();
        let cases: serde_json::Value = serde_json::from_str(&cases).unwrap();
        for case in cases.as_array().unwrap() {
            let text = |key: &str| case[key].as_str().unwrap();
            let ids = |key: &str| -> Vec<u32> { serde_json::from_value(case[key].clone()).unwrap() };
            let (before, after) = (text("before"), text("after"));
            let laid_out = |order| infill(&tokenizer, before, after, order, 1000).unwrap();
            assert_eq!(laid_out(InfillOrder::Psm), ids("psm"), "{family}: {case}");
            assert_eq!(laid_out(InfillOrder::Spm), ids("spm"), "{family}: {case}");
            let holed = Prompt::new(&format!("{before}{FILL_ME}{after}"), &tokenizer).unwrap();
            assert_eq!(holed.tokens, ids("psm"), "{family}: {case}");
            if !before.is_empty() {
                assert_eq!(Prompt::new(before, &tokenizer).unwrap().tokens, ids("plain"), "{family}: {case}");
            }
            // What a model writes in the middle comes back to the space.
            for text in [before, after, "  return x", " ", "x"] {
                let tokens = tokenizer.encode_middle(text).unwrap();
                assert_eq!(tokenizer.decode_middle(&tokens, true).unwrap(), text, "{family}");
                let mut told = Text::default();
                tokens.iter().for_each(|token| told.push(*token, &tokenizer).unwrap());
                told.finish(&tokenizer).unwrap();
                assert_eq!(told.as_str(), text, "{family}");
                let whole = tokenizer.encode_document(text).unwrap();
                assert_eq!(tokenizer.decode(&whole, false).unwrap(), text, "{family}");
            }
        }
        // Marks in a file are text, and a completion ends before them.
        let fim = tokenizer.fim().unwrap();
        let ends = tokenizer.ends_of_completions();
        assert!(fim.all().chain([tokenizer.eos()]).all(|token| ends.contains(&token)), "{family}");
        assert_eq!(fim.end.is_some(), family == "codellama");
        assert_eq!(tokenizer.bos().is_some(), family != "qwen");
        for token in fim.all() {
            let mark = tokenizer.decode(&[token], false).unwrap();
            let document = tokenizer.encode_document(&format!("x {mark} y")).unwrap();
            assert!(!document.iter().any(|id| ends.contains(id)), "{family}: {mark}");
        }
    }
}
