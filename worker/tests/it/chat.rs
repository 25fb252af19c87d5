//! Conversations: templates against transformers and references written by hand, packing against conversations alone.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tch::Device;
use tunefleet_proto::chat::{Conversation, Last, Message, Role};
use tunefleet_proto::job::{
    ChatLoss, ChatSpec, ChatTemplate, DataSpec, FimLevel, Packing, Precision, SegmentFormat,
};
use tunefleet_worker::chat::{Chat, model};
use tunefleet_worker::checkpoint::hugging_face;
use tunefleet_worker::data::tokenizer::Tokenizer;
use tunefleet_worker::data::{IGNORED, Sequences, Split};
use tunefleet_worker::init_model;
use tunefleet_worker::model::documents::Documents;
use tunefleet_worker::train::walk::Batch;

use crate::common::*;
use crate::data_support::{Workshop, documents, spec};

fn fixtures() -> Option<PathBuf> {
    fixtures_of("make_chat_fixtures.py", "chat")
}

fn json_of(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn messages(value: &Value) -> Vec<Message> {
    serde_json::from_value(value.clone()).unwrap()
}

#[test]
fn text_masks_and_tokens_are_those_of_transformers_and_of_references_by_hand() {
    let Some(dir) = fixtures() else { return };
    for case in json_of(&dir.join("index.json"))["cases"].as_array().unwrap() {
        let place = dir.join(case["directory"].as_str().unwrap());
        let tokenizer = Tokenizer::load(&place).unwrap();
        // Added by us they are the same tokens.
        let added: Vec<String> = serde_json::from_value(case["special_tokens"].clone()).unwrap();
        let base = dir.join("tokenizers").join(case["tokenizer"].as_str().unwrap());
        let ours = Tokenizer::load_with(&base, &added).unwrap();
        assert!(added.iter().all(|token| ours.id_of(token) == tokenizer.id_of(token)), "{}", place.display());

        let chat = Chat::of_tokenizer(&place, &tokenizer, ChatLoss::Assistant).unwrap();
        let text = std::fs::read_to_string(place.join("cases.jsonl")).unwrap();
        let (mut conversations, mut with_tokens) = (0, 0);
        for line in text.lines() {
            let row: Value = serde_json::from_str(line).unwrap();
            let mut turns = messages(&row["messages"]);
            let conversation = Conversation::new(turns.clone(), Last::Answer).unwrap();
            let (text, spans) = chat.text(&conversation).unwrap();
            assert_eq!(text, row["text"].as_str().unwrap(), "{}: {line}", place.display());
            let spans: Vec<[usize; 2]> = spans.into_iter().map(|span| [span.start, span.end]).collect();
            assert_eq!(json!(spans), row["spans"], "{}: {line}", place.display());
            conversations += 1;
            if row["ids"].is_array() {
                let tokens = chat.tokens(&conversation, &tokenizer).unwrap();
                let ids: Vec<u32> = tokens.iter().map(|token| token.id).collect();
                let mask: Vec<u32> = tokens.iter().map(|token| token.is_target.into()).collect();
                assert_eq!(json!(ids), row["ids"], "{}: {line}", place.display());
                assert_eq!(json!(mask), row["mask"], "{}: {line}", place.display());
                with_tokens += 1;
            }
            turns.pop();
            let question = Conversation::new(turns, Last::Question).unwrap();
            let prompt = chat.prompt(&question, &tokenizer).unwrap();
            if row["prompt_ids"].is_array() {
                assert_eq!(json!(prompt), row["prompt_ids"], "{}: {line}", place.display());
            }
        }
        println!("{}: {conversations} conversations, {with_tokens} with tokens", place.display());
        assert!(conversations == 1000 && with_tokens >= 200);
    }
}

/// A dataset of conversations, and a tokenizer with a template beside it.
struct Room {
    workshop: Workshop,
    chat_model: PathBuf,
}

fn chat_spec(template: ChatTemplate, special_tokens: &[&str]) -> ChatSpec {
    let special_tokens = special_tokens.iter().map(|token| (*token).to_owned()).collect();
    ChatSpec { template, loss: ChatLoss::Assistant, system: None, special_tokens }
}

fn chatml() -> ChatSpec {
    chat_spec(ChatTemplate::BuiltIn("chatml".to_owned()), &["<|im_start|>", "<|im_end|>"])
}

/// Conversations of many lengths.
fn conversations(count: u64, seed: u64) -> Vec<String> {
    let texts = documents(count * 2, seed);
    let turn =
        |role, text: &String| Message::new(role, format!("{}.", text.chars().take(90).collect::<String>()));
    texts
        .chunks_exact(2)
        .map(|pair| {
            let turns = vec![turn(Role::User, &pair[0]), turn(Role::Assistant, &pair[1])];
            Conversation::new(turns, Last::Answer).unwrap().to_json()
        })
        .collect()
}

impl Room {
    fn new(train: &[String], validation: &[String], chat: &ChatSpec) -> Self {
        let workshop = Workshop::new(train, validation, SegmentFormat::Arrow);
        let mut manifest = workshop.manifest();
        manifest.settings = json!({ "kind": "chat" });
        workshop.write_manifest(&manifest);
        let (base, chat_model) = (workshop.dir.path().join("base"), workshop.dir.path().join("chat-model"));
        init_model::init("tiny", Some(&workshop.tokenizer()), 1, Precision::Fp32, &base).unwrap();
        model::init(chat, &base, &workshop.tokenizer(), &chat_model).unwrap();
        Room { workshop, chat_model }
    }

    fn spec(&self, sequence_tokens: u32) -> DataSpec {
        DataSpec {
            sequence_tokens,
            fim_rate: 0.0,
            document_mask: true,
            chat: Some(chatml()),
            ..spec(Packing::Whole, FimLevel::Window)
        }
    }

    fn open(&self, spec: &DataSpec, split: Split) -> Result<Sequences, tunefleet_worker::data::Error> {
        Sequences::open(spec, &self.workshop.dataset(), &self.chat_model, split, &self.workshop.cache())
    }
}

#[test]
fn every_conversation_is_whole_in_one_sequence_once_an_epoch_and_targets_are_answers() {
    let room = Room::new(&conversations(60, 1), &conversations(12, 2), &chatml());
    let sequences = room.open(&room.spec(400), Split::Train).unwrap();
    let tokenizer = Tokenizer::load(&room.chat_model).unwrap();
    let (begin, end) = (tokenizer.id_of("<|im_start|>").unwrap(), tokenizer.id_of("<|im_end|>").unwrap());
    let (mut epochs, mut at) = (Vec::new(), 0);
    for _ in 0..3 {
        let (mut seen, mut count) = (Vec::new(), 0);
        while seen.len() < 60 {
            let row = sequences.sequence(at).unwrap();
            assert_eq!((row.tokens.len(), row.targets.len()), (400, 400));
            assert_eq!(row.documents.iter().sum::<u32>(), 400);
            let mut first = 0;
            for length in &row.documents {
                let range = first..first + *length as usize;
                let (tokens, targets) = (&row.tokens[range.clone()], &row.targets[range]);
                first += *length as usize;
                if tokens[0] != begin {
                    assert!(targets.iter().all(|target| *target == IGNORED), "padding is no target");
                    continue;
                }
                seen.push(tokens.to_vec());
                assert_eq!(*targets.last().unwrap(), IGNORED, "what follows is another conversation's");
                // The answer with its end, where it was not cut off.
                let last = targets.iter().rposition(|target| *target != IGNORED).unwrap();
                assert!(targets[last] == i64::from(end) || tokens.len() == 400);
                let question = tokens.iter().position(|token| *token == end).unwrap();
                assert!(
                    targets[..question].iter().all(|target| *target == IGNORED),
                    "a question is a target"
                );
                assert!(
                    targets.iter().zip(&tokens[1..]).all(|(t, next)| *t == IGNORED || *t == i64::from(*next))
                );
            }
            (at, count) = (at + 1, count + 1);
        }
        assert_eq!(seen.len(), 60);
        assert_eq!(seen.iter().collect::<HashSet<_>>().len(), 60, "each once");
        epochs.push((seen, count));
    }
    assert_ne!(epochs[0].0, epochs[1].0, "each epoch has an order of its own");
    assert_eq!(sequences.len_per_epoch(), epochs[0].1);
    let used: usize = epochs[0].0.iter().map(Vec::len).sum();
    let filled = used as f64 / (400 * epochs[0].1) as f64;
    println!("sequences are {:.1}% full", 100.0 * filled);
    assert!(filled > 0.85, "{filled}");

    // A resume seeks: any sequence is the same, whenever it is asked for.
    let again = room.open(&room.spec(400), Split::Train).unwrap();
    for index in [at - 1, 3, 0, at - 2] {
        assert_eq!(again.sequence(index).unwrap(), sequences.sequence(index).unwrap());
    }
    let validation = room.open(&room.spec(400), Split::Validation).unwrap();
    let rows = (0..validation.len_per_epoch()).map(|index| validation.sequence(index).unwrap());
    let held_out = rows.map(|row| row.targets.iter().filter(|target| **target == i64::from(end)).count());
    assert_eq!(held_out.sum::<usize>(), 12);
    assert!(
        validation.sequence(validation.len_per_epoch()).unwrap_err().to_string().contains("does not exist")
    );
}

#[test]
fn what_is_too_long_is_cut_at_its_end_and_told() {
    let room = Room::new(&conversations(40, 1), &conversations(4, 2), &chatml());
    let whole = room.open(&room.spec(256), Split::Train).unwrap();
    assert_eq!(whole.left_out(), None);
    let sequences = room.open(&room.spec(64), Split::Train).unwrap();
    let told = sequences.left_out().unwrap();
    println!("{told}");
    assert!(
        told.contains("of 40 conversations of the train split are longer than data.sequence_tokens (64)"),
        "{told}"
    );
    assert!(told.contains("have nothing to learn before that"), "{told}");
    for index in 0..2 * sequences.len_per_epoch() {
        let row = sequences.sequence(index).unwrap();
        assert!(row.targets.iter().any(|target| *target != IGNORED), "a sequence with nothing to learn");
    }
    let error = room.open(&room.spec(8), Split::Train).unwrap_err().to_string();
    assert!(error.contains("has anything to learn within 8 tokens; raise data.sequence_tokens"), "{error}");
}

#[test]
fn conversations_and_files_are_not_taken_for_each_other() {
    let room = Room::new(&conversations(5, 1), &[], &chatml());
    let files = spec(Packing::Continuous, FimLevel::Window);
    let error = room.open(&files, Split::Train).unwrap_err().to_string();
    assert!(error.contains("holds conversations; data.chat.template says how"), "{error}");
    let code = Workshop::standard();
    let open = |tokenizer: &Path| {
        Sequences::open(&room.spec(64), &code.dataset(), tokenizer, Split::Train, &code.cache())
            .unwrap_err()
            .to_string()
    };
    assert!(open(&room.chat_model).contains("holds files; data.chat is for conversations"));
    let error = open(&code.tokenizer());
    assert!(error.contains("there is no chat template") && error.contains("init-chat"), "{error}");
    // A row that is none is named.
    let broken = Room::new(&[r#"[{"role": "user", "content": "a"}]"#.to_owned()], &[], &chatml());
    let error = broken.open(&broken.spec(64), Split::Train).unwrap_err().to_string();
    assert!(error.contains("conversation src/0.rs: it ends with the user's turn 1"), "{error}");
}

#[test]
fn packed_and_masked_loss_and_gradients_are_those_of_conversations_alone() {
    let Some(dir) = fixtures() else { return };
    let packed = &json_of(&dir.join("index.json"))["packed"];
    let place = dir.join(packed["directory"].as_str().unwrap());
    let rows = json_of(&place.join("conversations.json"));
    let rows: Vec<String> = rows
        .as_array()
        .unwrap()
        .iter()
        .map(|row| Conversation::new(messages(row), Last::Answer).unwrap().to_json())
        .collect();
    let workshop = Workshop::new(&rows, &[], SegmentFormat::Arrow);
    let mut manifest = workshop.manifest();
    manifest.settings = json!({ "kind": "chat" });
    workshop.write_manifest(&manifest);
    let sequence_tokens = packed["sequence_tokens"].as_u64().unwrap() as u32;
    let spec = DataSpec {
        sequence_tokens,
        fim_rate: 0.0,
        document_mask: true,
        chat: Some(chatml()),
        ..spec(Packing::Whole, FimLevel::Window)
    };
    let tokenizer = dir.join(packed["tokenizer"].as_str().unwrap());
    let sequences =
        Sequences::open(&spec, &workshop.dataset(), &tokenizer, Split::Train, &workshop.cache()).unwrap();
    let fixture = tensors(&place.join("fixture.safetensors"));
    let batches: Vec<Batch> = (0..sequences.len_per_epoch())
        .map(|index| {
            let row = sequences.sequence(index).unwrap();
            let ids: Vec<i64> = row.tokens.iter().map(|token| i64::from(*token)).collect();
            let tensor = |values: &[i64]| tch::Tensor::from_slice(values).view([1, -1]);
            let mut batch = Batch::new(tensor(&ids), tensor(&row.targets));
            batch.documents = Some(Documents::new([row.documents.as_slice()].into_iter(), Device::Cpu));
            batch
        })
        .collect();
    assert!(
        batches.len() < rows.len() * 2 / 3,
        "{} sequences of {} conversations",
        batches.len(),
        rows.len()
    );
    let targets: i64 =
        batches.iter().map(|batch| batch.targets_bt.ne(IGNORED).sum(None).int64_value(&[])).sum();
    assert_eq!(targets, fixture["count"].int64_value(&[0]));
    for options in [RECOMPUTE, KEEP] {
        let mut walk = walk(&place.join("model"), Precision::Fp32, SOLO, options, |_| ());
        let (loss, grads) = loss_and_grads_of_all(&mut walk, &batches);
        let peer = fixture["loss"].double_value(&[0]);
        println!("loss {loss}, transformers {peer}");
        assert!((loss - peer).abs() <= 1e-6 * peer, "loss {loss}, transformers {peer}");
        let all = grads.values().map(|g| norm(g).powi(2)).sum::<f64>().sqrt();
        assert_eq!(grads.len(), fixture.keys().filter(|name| name.starts_with("grad.")).count());
        for (name, ours) in &grads {
            let peer = &fixture[&format!("grad.{name}")];
            let (error, limit) = (distance(ours, peer), 1e-5 * norm(peer) + 1e-7 * all);
            assert!(error <= limit, "{name}: {error:.2e} > {limit:.2e}");
        }
    }
}

/// The error of a template that is given as a file.
fn refusal(jinja: &str, loss: ChatLoss) -> String {
    let dir = tempfile::tempdir().unwrap();
    let workshop = Workshop::standard();
    let tokenizer = Tokenizer::load(&workshop.tokenizer()).unwrap();
    std::fs::write(dir.path().join("chat_template.jinja"), jinja).unwrap();
    let chat = match Chat::of_tokenizer(dir.path(), &tokenizer, loss) {
        Ok(chat) => chat,
        Err(error) => return error.to_string(),
    };
    let turns = vec![Message::new(Role::User, "a"), Message::new(Role::Assistant, "b")];
    let conversation = Conversation::new(turns, Last::Answer).unwrap();
    chat.tokens(&conversation, &tokenizer).unwrap_err().to_string()
}

#[test]
fn templates_that_fail_or_do_not_end_are_refused_by_name() {
    let marked = "{% generation %}x{% endgeneration %}";
    for (jinja, message) in [
        ("{% for message in messages %}".to_owned(), "chat_template.jinja: line 1"),
        (format!("{marked}{{{{ raise_exception('roles must alternate') }}}}"), "roles must alternate"),
        (format!("{marked}{{{{ strftime_now('%d') }}}}"), "strftime_now"),
        (format!("{marked}{{{{ messages[7].content.strip() }}}}"), "undefined"),
        (
            format!(
                "{marked}{{% for a in range(9999) %}}{{% for b in range(9999) %}}{{% for c in range(9999) %}}{{% endfor \
                 %}}{{% endfor %}}{{% endfor %}}"
            ),
            "does a loop have no end?",
        ),
        (
            format!(
                "{marked}{{% set ns = namespace(x='0123456789') %}}{{% for a in range(99) %}}{{% set ns.x = ns.x ~ ns.x %}}{{% endfor %}}"
            ),
            "does a loop have no end?",
        ),
        (format!("{marked}{{% macro f() %}}{{{{ f() }}}}{{% endmacro %}}{{{{ f() }}}}"), "recursion"),
    ] {
        let error = refusal(&jinja, ChatLoss::Assistant);
        println!("{error}");
        assert!(error.contains(message), "{error}");
    }
    let plain = "{% for message in messages %}{{ message.content }}{% endfor %}";
    let error = refusal(plain, ChatLoss::Assistant);
    assert!(
        error.contains("does not mark what the assistant says") && error.contains("data.chat.loss: all"),
        "{error}"
    );
}

#[test]
fn a_system_that_is_given_speaks_where_none_does_and_is_part_of_the_template() {
    let spec = ChatSpec { system: Some("Be \"kind\".\n".to_owned()), ..chatml() };
    let room = Room::new(&conversations(3, 1), &[], &spec);
    let tokenizer = Tokenizer::load(&room.chat_model).unwrap();
    let chat = Chat::of_tokenizer(&room.chat_model, &tokenizer, ChatLoss::Assistant).unwrap();
    let text = |turns: &[(Role, &str)]| {
        let turns = turns.iter().map(|(role, content)| Message::new(*role, *content)).collect();
        chat.text(&Conversation::new(turns, Last::Answer).unwrap()).unwrap().0
    };
    let asked = [(Role::User, "a"), (Role::Assistant, "b")];
    assert!(
        text(&asked)
            .starts_with("<|im_start|>system\nBe \"kind\".\n<|im_end|>\n<|im_start|>user\na<|im_end|>")
    );
    let own = [&[(Role::System, "Be brief.")][..], &asked].concat();
    assert!(text(&own).starts_with("<|im_start|>system\nBe brief.<|im_end|>"));
}

#[test]
fn tokens_are_added_to_a_model_whose_weights_are_linked_to() {
    let room = Room::new(&conversations(5, 1), &[], &chatml());
    let base = room.workshop.dir.path().join("base");
    let (before, after) =
        (hugging_face::read_config(&base).unwrap(), hugging_face::read_config(&room.chat_model).unwrap());
    assert_eq!(after.vocab_size, before.vocab_size + 2);
    assert_eq!(after.added_tokens, [before.vocab_size, before.vocab_size + 1]);
    let link = std::fs::symlink_metadata(room.chat_model.join("model.safetensors")).unwrap();
    assert!(link.is_symlink());
    let plan = tunefleet_proto::shard_plan::ShardPlan::new;
    let numerics = tunefleet_worker::model::numerics::Numerics::new(Device::Cpu, Precision::Fp32);
    let of = |dir: &Path, config| {
        let plan = plan(config, 1);
        let buffers = hugging_face::load_weights(dir, &plan, numerics).unwrap();
        tunefleet_worker::train::units::views(&plan.units[0], &buffers[0])
    };
    let (old, new) = (of(&base, &before), of(&room.chat_model, &after));
    let rows = before.vocab_size as i64;
    assert_eq!(new[0].narrow(0, 0, rows), old[0]);
    let mean = old[0].mean_dim(0, false, tch::Kind::Float);
    assert!(largest_difference(&new[0].narrow(0, rows, 2), &mean.unsqueeze(0)) < 1e-6);
    for at in 1..old.len() {
        assert_eq!(new[at], old[at]);
    }
    // A tokenizer that has them all adds nothing.
    let again = room.workshop.dir.path().join("again");
    let made = model::init(&chatml(), &room.chat_model, &room.chat_model, &again).unwrap();
    assert!(made.added.is_empty());
    assert_eq!(hugging_face::read_config(&again).unwrap().added_tokens, after.added_tokens);
    assert_eq!(of(&again, &after)[0], new[0]);
    // Somebody's files are not replaced.
    std::fs::write(again.join("notes.txt"), "mine").unwrap();
    let error = model::init(&chatml(), &base, &room.workshop.tokenizer(), &again).unwrap_err().to_string();
    assert!(error.contains("notes.txt"), "{error}");
}
