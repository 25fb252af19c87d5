//! Conversations from end to end: collected, learnt, mixed with a copilot, served, and talked to in the terminal.

use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tunefleet_tests::collecting::Place;
use tunefleet_tests::job::{Builder, Job};
use tunefleet_tests::process::{Ended, Running};
use tunefleet_tests::programs;

use crate::evaluating::{VARIED, commit_varied};
use crate::serving::{completion, free_port, post};

/// What is said in conversation `number`.
fn said(number: usize) -> (String, String) {
    let word = |at: usize| (number * 7919 + at * 104_729) % 997;
    let question = format!("What is {} and {}?", word(1), word(2));
    (question, format!("It is {}, and <|im_end|> is text.", word(1) + word(2)))
}

/// The same conversations in the shapes of several datasets: two of each, then more of the first shape.
fn write_conversations(dir: &Path) {
    let mut messages = String::new();
    for number in 0..48 {
        let (question, answer) = said(number);
        let turns =
            json!([{ "role": "user", "content": question }, { "role": "assistant", "content": answer }]);
        let _ = writeln!(messages, "{}", json!({ "messages": turns }));
    }
    fs::write(dir.join("messages.jsonl"), messages).unwrap();
    let (question, answer) = said(100);
    let lima = json!({ "conversations": [question, answer], "source": "somewhere" });
    fs::write(dir.join("lima.jsonl"), format!("{lima}\n")).unwrap();
    let (question, answer) = said(101);
    let guanaco = json!({ "text": format!("### Human: {question}### Assistant: {answer}") });
    fs::write(dir.join("guanaco.jsonl"), format!("{guanaco}\n")).unwrap();
    let (question, answer) = said(102);
    let rendered = format!(
        "<|system|> Be kind. <|endoftext|> <|prompter|> {question} <|endoftext|> <|assistant|> {answer} <|endoftext|>"
    );
    fs::write(dir.join("rendered.jsonl"), format!("{}\n", json!({ "content": rendered }))).unwrap();
    let held_out: String = (200..206)
        .map(|number| {
            let (question, answer) = said(number);
            json!({ "messages": [{ "from": "human", "value": question }, { "from": "gpt", "value": answer }] })
                .to_string()
                + "\n"
        })
        .collect();
    fs::write(dir.join("test.jsonl"), held_out).unwrap();
}

const COLLECT: &str = "collect:
  kind: chat
  sources:
    - dataset: { path: messages.jsonl }
    - dataset: { path: lima.jsonl }
    - dataset: { path: guanaco.jsonl }
    - dataset: { path: rendered.jsonl }
    - dataset: { path: test.jsonl, held_out: true }";
const CHATML: [&str; 4] = ["--set", "data.chat.template=chatml", "--set", "data.sequence_tokens=128"];

fn assistant() -> Builder {
    Job::builder()
        .dataset(COLLECT)
        .section("adapter: { rank: 4, quantize: nf4 }")
        .learning_rate("5e-3")
        .train("warmup_steps: 1")
        .steps(20)
}

fn worker(arguments: &[&str]) -> Ended {
    let mut command = Command::new(programs::worker());
    command.args(arguments);
    Running::start(command).wait()
}

fn utf8(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// What `worker chat` answers to some turns.
fn talk(arguments: &[&str], turns: &str) -> (String, String) {
    let mut chat = Command::new(programs::worker())
        .arg("chat")
        .args(arguments)
        .args(["--temperature", "0", "--max-new-tokens", "12", "--dtype", "fp32"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    chat.stdin.take().unwrap().write_all(turns.as_bytes()).unwrap();
    let output = chat.wait_with_output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{}", text(&output.stderr));
    (text(&output.stdout), text(&output.stderr))
}

/// Rows of a model's embedding.
fn rows(model: &Path) -> u64 {
    let config: Value = serde_json::from_slice(&fs::read(model.join("config.json")).unwrap()).unwrap();
    config["vocab_size"].as_u64().unwrap()
}

fn answer(port: u16, model: &str, messages: &Value) -> (u16, Value) {
    let body = json!({ "model": model, "messages": messages, "max_tokens": 12, "temperature": 0 });
    let (status, body) = post(port, "POST", "/v1/chat/completions", &body.to_string()).unwrap();
    (status, serde_json::from_str(&body).unwrap())
}

#[test]
fn a_copilot_and_an_assistant_are_trained_mixed_measured_and_served() {
    let job = assistant().build();
    write_conversations(job.dir());
    job.run(&CHATML).expect(0);
    let losses: Vec<f64> = job.metrics().losses().values().map(|bits| f64::from_bits(*bits)).collect();
    assert!(losses[19] < losses[0] - 0.5, "{losses:?}");

    // The adapter brings its template, its tokens and their rows.
    let (base, chat_model, adapter) =
        (job.output().join("model"), job.output().join("chat-model"), job.output().join("adapter"));
    let read = |path: &Path| fs::read_to_string(path).unwrap();
    let config: Value = serde_json::from_str(&read(&adapter.join("adapter_config.json"))).unwrap();
    assert_eq!(config["trainable_token_indices"], json!([rows(&base), rows(&base) + 1]), "{config}");
    assert!(read(&adapter.join("chat_template.jinja")).contains("<|im_start|>"));
    assert!(read(&adapter.join("tokenizer.json")).contains("<|im_start|>"));
    assert!(fs::symlink_metadata(chat_model.join("model.safetensors")).unwrap().is_symlink());

    let [base_text, adapter_text] = [&base, &adapter].map(|dir| utf8(dir));
    worker(&["chat", "--model", base_text, "--adapter", adapter_text]).expect(1).says(&[
        &format!("has {} tokens, the model's embedding {}", rows(&base) + 2, rows(&base)),
        "`chat-model`",
    ]);

    let copilot = Job::builder()
        .dataset(VARIED)
        .model(&format!("model: {{ path: {} }}", base.display()))
        .tokenizer("tokenizer: { from_model: true }")
        .section("adapter: { rank: 4, quantize: nf4 }")
        .learning_rate("5e-3")
        .train("warmup_steps: 1")
        .steps(20)
        .build();
    commit_varied(&copilot.dir().join("repos/varied"));
    copilot.run(&[]).expect(0);
    let copilot_adapter = copilot.output().join("adapter");

    let grid = job.dir().join("grid");
    worker(&[
        "evaluate",
        "grid",
        "--model",
        utf8(&chat_model),
        "--part",
        &format!("copilot={}", copilot_adapter.display()),
        "--part",
        &format!("assistant={}", adapter.display()),
        "--exam",
        &format!("code={}", copilot.output().join("dataset").display()),
        "--exam",
        &format!("chat={}", job.output().join("dataset").display()),
        "--own",
        "copilot=code",
        "--own",
        "assistant=chat",
        "--search",
        "0.5,1",
        "--window-tokens",
        "128",
        "--out",
        utf8(&grid),
    ])
    .expect(0)
    .says(&["copilot: gains", "of which the mix keeps", "assistant: gains"]);
    let found: Value = serde_json::from_str(&read(&grid.join("grid.json"))).unwrap();
    let loss = |model: &str, exam: &str| found["losses"][model][exam].as_f64().unwrap();
    assert!(
        loss("copilot", "code") < loss("base", "code") && loss("assistant", "chat") < loss("base", "chat"),
        "{found}"
    );
    assert_eq!(found["tried"].as_array().unwrap().len(), 4);
    let least = |tried: &Value| tried[1].as_f64().unwrap();
    let best = found["tried"].as_array().unwrap().iter().map(least).fold(f64::NEG_INFINITY, f64::max);
    let chosen =
        found["tried"].as_array().unwrap().iter().find(|tried| tried[0] == found["weights"]).unwrap();
    assert_eq!(least(chosen), best, "{found}");

    let both = job.dir().join("both");
    worker(&[
        "adapter",
        "combine",
        "--adapter",
        utf8(&copilot_adapter),
        "--adapter",
        utf8(&adapter),
        "--model",
        utf8(&chat_model),
        "--trained-on",
        utf8(&base),
        "--out",
        utf8(&both),
    ])
    .expect(0)
    .says(&[
        "rank [8]",
        &format!("{} was trained on {}, a sibling", copilot_adapter.display(), base.display()),
        &format!(
            "transformer.wte.weight has {} rows, it had {}; every weight is the same",
            rows(&base) + 2,
            rows(&base)
        ),
        &format!("{} was trained on this model", adapter.display()),
    ]);

    let port = free_port();
    let mut server = Command::new(programs::worker());
    server.arg("serve").arg("--model").arg(&chat_model).args(["--listen", &format!("127.0.0.1:{port}")]);
    for (name, dir) in [("copilot", &copilot_adapter), ("assistant", &adapter), ("both", &both)] {
        server.args(["--adapter", &format!("{name}={}", dir.display())]);
    }
    server.args(["--dtype", "fp32"]);
    let mut server = Running::start(server);
    server.wait_until("an answer", || completion(port, "").is_some());
    let asked = json!([{ "role": "user", "content": said(3).0 }]);
    for name in ["", "copilot", "assistant", "both"] {
        assert!(completion(port, name).is_some(), "{name}");
        let (status, told) = answer(port, name, &asked);
        assert_eq!((status, &told["choices"][0]["message"]["role"]), (200, &json!("assistant")), "{told}");
    }
    let (_, told) = answer(port, "both", &asked);
    let (shown, _) = talk(
        &["--model", utf8(&chat_model), "--adapter", utf8(&both), "--repetition-penalty", "1"],
        &said(3).0,
    );
    assert_eq!(shown.trim(), told["choices"][0]["message"]["content"].as_str().unwrap(), "{told}");
    let long = "many words ".repeat(200);
    for (messages, rule) in [
        (json!([]), "no turns"),
        (json!([{ "role": "assistant", "content": "a" }]), "turn 1 is the assistant's"),
        (
            json!([{ "role": "user", "content": "a" }, { "role": "user", "content": "b" }]),
            "turn 2 is the user's",
        ),
        (json!([{ "role": "user", "content": " " }]), "turn 1, the user's, is empty"),
        (json!([{ "role": "judge", "content": "a" }]), "the role \"judge\" is not known"),
        (json!([{ "role": "user", "content": long }]), "leave its oldest turns out"),
    ] {
        let (status, told) = answer(port, "both", &messages);
        assert_eq!(status, 400, "{told}");
        assert!(told["error"]["message"].as_str().unwrap().contains(rule), "{told}");
    }
    server.signal(Signal::SIGINT);
    server.wait().expect(0);

    talked(&chat_model, &adapter);
}

/// Turns over several lines, a conversation that grows past the model's positions, and a question that never fits.
fn talked(chat_model: &Path, adapter: &Path) {
    let model = ["--model", utf8(chat_model), "--adapter", utf8(adapter), "--system", "Be brief."];
    let mut turns = String::from("\"\"\"\nWhat is\n1 and 2?\n\"\"\"\n/reset\n");
    for number in 0..8 {
        let _ = writeln!(turns, "{}", said(number).0);
    }
    let _ = writeln!(turns, "{}", "many words ".repeat(200));
    turns.push_str("/exit\nnever asked\n");
    let (shown, told) = talk(&model, &turns);
    assert!(shown.lines().count() >= 9, "{shown}");
    assert!(told.contains("the oldest question and its answer are left out"), "{told}");
    assert!(told.contains("error: the question has") && told.contains("ask less"), "{told}");
}

#[test]
fn all_weights_can_be_trained_on_conversations_and_the_export_has_the_template() {
    let job = Job::builder().dataset(COLLECT).learning_rate("5e-3").steps(6).build();
    write_conversations(job.dir());
    job.run(&["--set", "data.chat.template=starchat", "--set", "data.sequence_tokens=128"]).expect(0);
    let export = job.output().join("export");
    let config: Value = serde_json::from_slice(&fs::read(export.join("config.json")).unwrap()).unwrap();
    assert_eq!(config["tunefleet_added_tokens"], Value::Null);
    assert_eq!(rows(&export), rows(&job.output().join("model")) + 4);
    let (shown, _) = talk(&["--model", utf8(&export)], "hello\n");
    assert!(shown.ends_with('\n'));
    // As text, nothing is added.
    let job = Job::builder().dataset(COLLECT).steps(2).build();
    write_conversations(job.dir());
    let said = [
        "--set",
        "data.chat={template: prompter, loss: all, system: Be kind.}",
        "--set",
        "data.sequence_tokens=32",
    ];
    job.run(&said).expect(0).says(&["are longer than data.sequence_tokens (32)"]);
    let export = job.output().join("export");
    assert!(fs::read_to_string(export.join("chat_template.jinja")).unwrap().contains("Be kind."));
    assert_eq!(rows(&export), rows(&job.output().join("model")));
}

#[test]
fn a_row_that_is_no_conversation_is_named_or_left_out_and_counted() {
    let place = Place::new();
    let turns = |turns: Value| json!({ "messages": turns }).to_string();
    let user = |content: &str| json!({ "role": "user", "content": content });
    let assistant = |content: &str| json!({ "role": "assistant", "content": content });
    let good = turns(json!([user("a"), assistant("b")]));
    let collect = |name: &str, more: Value| {
        let mut spec = json!({ "kind": "chat", "sources": [{ "dataset": { "path": place.path("rows.jsonl") } }], "validation_fraction": 0 });
        spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let mut command = place.collect_job(name, &spec);
        command.args(["--set", "data.chat.template=prompter"]);
        Running::start(command).wait()
    };
    for (number, (row, rule)) in [
        (
            turns(json!([user("a"), user("b"), assistant("c")])),
            "turn 2 is the user's; it must be the assistant's",
        ),
        (turns(json!([user("a"), assistant("  ")])), "turn 2, the assistant's, is empty"),
        (turns(json!([user("a")])), "it ends with the user's turn 1"),
        (turns(json!([{ "role": "judge", "content": "a" }])), "the role \"judge\" is not known"),
        (json!({ "messages": "hello" }).to_string(), "begins with none of"),
        (json!({ "words": "hello" }).to_string(), "no column \"messages\" or \"conversations\""),
    ]
    .into_iter()
    .enumerate()
    {
        fs::write(place.path("rows.jsonl"), format!("{good}\n{row}\n")).unwrap();
        let name = format!("bad-{number}");
        let refused = collect(&name, json!({})).expect(1).says(&["rows.jsonl", rule]);
        if number < 5 {
            refused.says(&["row 2", "collect.invalid_conversations: drop"]);
            collect(&name, json!({ "invalid_conversations": "drop" })).expect(0).says(&[
                "invalid_conversation 1",
                "of which the first is",
                "row 2",
            ]);
        }
    }
    // Keys for code, and repositories, have nothing to say of conversations.
    let job = Job::builder()
        .dataset("collect: { kind: chat, sources: [repos/first], max_line_chars: 100, invalid_conversations: perhaps }")
        .build();
    job.run(&[]).expect(78).says(&[
        "holds files, but collect.kind is chat",
        "collect.max_line_chars is of use only with collect.kind: code",
        "collect.invalid_conversations: expected one of error, drop",
        "there is no data.chat",
    ]);
    let job = Job::builder().build();
    job.run(&["--set", "data.chat={template: chatlm, special_tokens: ['']}", "--set", "data.fim_rate=0.5"])
        .expect(78)
        .says(&["no template is called \"chatlm\" (did you mean \"chatml\"?)", "data.fim_rate is for code"]);
    job.run(&["--set", "data.chat.template=chatml"])
        .expect(78)
        .says(&["data.chat is for conversations, but collect.kind is code"]);
}
