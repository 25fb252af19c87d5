//! Nothing that is given is lost without a word, and nothing that is given breaks a conversion.

use proptest::prelude::*;

use super::*;
use crate::convert::keys::{Key, Takes};

/// Values that `takes` accepts, at its ends and between.
fn samples(takes: &Takes) -> Vec<String> {
    match takes {
        Takes::Section => vec![],
        Takes::Switch => vec![String::new()],
        Takes::Bool => vec!["true".to_owned(), "false".to_owned()],
        Takes::Count(low, high) => [*low, 1, 8, *high]
            .into_iter()
            .filter(|count| (low..=high).contains(&count))
            .map(|count| count.to_string())
            .collect(),
        Takes::Number(low, high) => [*low, 0.25, *high].iter().map(|number| number.to_string()).collect(),
        Takes::Pair(..) => vec!["[0.5, 0.5]".to_owned()],
        Takes::Text => vec!["AdamW".to_owned(), "train".to_owned(), "content".to_owned()],
        Takes::Word(words, _) => words.iter().map(|word| format!("{word:?}")).collect(),
        Takes::Auto(takes) => samples(takes),
        Takes::Anything => vec!["something".to_owned()],
    }
}

/// A config that says `key: value` and, at its top, `more`.
fn saying(key: &Key, value: &str, more: &str) -> String {
    let parts: Vec<&str> = key.name.split('.').collect();
    let opening: String = parts.iter().map(|part| format!("{{\"{part}\": ")).collect();
    format!("{opening}{value}{}", "}".repeat(parts.len())).replacen('{', &format!("{{{more}"), 1)
}

/// Nothing is lost without a word: what is given stands in the job file's comments, or is told.
#[test]
fn every_value_of_every_setting_is_used_or_told() {
    let assert_heard = |written: &str, converted: Result<Converted, String>, given: &str| {
        let heard = match converted {
            Ok(Converted { text, notes, .. }) => text + &notes,
            // Refused by a rule that binds it to another value.
            Err(message) if message.contains("no sound job") => return,
            Err(message) => message,
        };
        assert!(heard.contains(written), "{written} of {given} is lost in\n{heard}");
    };
    let name = |key: &Key| format!("{}: ", key.name.rsplit('.').next().unwrap());
    for key in keys::config_keys() {
        let means = match key.name.split('.').next() {
            Some("fsdp_config" | "parallelism_config") => "\"distributed_type\": \"FSDP\", ",
            Some("deepspeed_config") => "\"distributed_type\": \"DEEPSPEED\", ",
            Some("distributed_type") => "",
            _ => "\"distributed_type\": \"MULTI_GPU\", ",
        };
        for value in samples(&key.takes) {
            let text = saying(key, &value, means);
            assert_heard(&name(key), accelerate(&text), &text);
        }
    }
    for key in keys::deepspeed_keys() {
        for value in samples(&key.takes) {
            let text = saying(key, &value, "");
            let config = "distributed_type: DEEPSPEED\nnum_processes: 2\n";
            let given = Given { accelerate: Some(config), deepspeed: Some(&text), ..Given::default() };
            assert_heard(&name(key), given.convert(), &text);
        }
    }
    for key in keys::script_keys().chain(keys::launch_keys()) {
        for value in samples(&key.takes) {
            let argument = format!("{} {value}", key.name);
            let is_launch = keys::launch_keys().any(|launch| launch.name == key.name);
            let args = if is_launch { format!("accelerate launch {argument} train.py") } else { argument };
            assert_heard(key.name, script(&args), &args);
        }
    }
}

/// Text made of what configs are made of, sound or not.
fn config_text() -> impl Strategy<Value = String> {
    let names: Vec<String> = keys::config_keys()
        .chain(keys::deepspeed_keys())
        .flat_map(|key| key.name.split('.').map(str::to_owned).collect::<Vec<_>>())
        .collect();
    let value = prop_oneof![
        Just("FSDP".to_owned()),
        Just("DEEPSPEED".to_owned()),
        Just("auto".to_owned()),
        any::<i64>().prop_map(|number| number.to_string()),
        any::<f64>().prop_map(|number| number.to_string()),
        "\\PC{0,12}",
        Just("\n ".to_owned()),
    ];
    let line = (0usize..3, proptest::sample::select(names), value)
        .prop_map(|(depth, name, value)| format!("{}{name}: {value}\n", "  ".repeat(depth)));
    prop_oneof![
        proptest::collection::vec(line, 0..12).prop_map(|lines| lines.concat()),
        "[\\PC\\n\\t]{0,200}",
    ]
}

/// As [`config_text`], of an argument string.
fn args_text() -> impl Strategy<Value = String> {
    let names: Vec<String> =
        keys::script_keys().chain(keys::launch_keys()).map(|key| key.name.to_owned()).collect();
    let word = prop_oneof![
        proptest::sample::select(names),
        Just("accelerate launch".to_owned()),
        Just("train.py".to_owned()),
        any::<i64>().prop_map(|number| number.to_string()),
        any::<f64>().prop_map(|number| number.to_string()),
        "\\PC{0,12}",
        Just("\\\n".to_owned()),
    ];
    prop_oneof![
        proptest::collection::vec(word, 0..12).prop_map(|words| words.join(" ")),
        "[\\PC\\n\\t]{0,200}",
    ]
}

proptest! {
    #[test]
    fn no_text_breaks_a_conversion(
        accelerate in proptest::option::of(config_text()),
        deepspeed in proptest::option::of(config_text()),
        args in proptest::option::of(args_text()),
        ignore_unknown: bool,
    ) {
        let given = Given {
            accelerate: accelerate.as_deref(),
            deepspeed: deepspeed.as_deref(),
            args: args.as_deref(),
            ignore_unknown,
        };
        // A sound conversion loads: `convert` unwraps that.
        if let Err(message) = given.convert() {
            prop_assert!(!message.is_empty());
        }
        let _ = recognise::recognise(Path::new("x.yaml"), accelerate.as_deref().unwrap_or_default());
    }
}
