use super::*;

fn config(targets: &[&str]) -> LoraConfig {
    LoraConfig {
        rank: 32,
        alpha: 64.0,
        dropout: 0.0,
        rslora: false,
        dora: false,
        targets: Targets::Suffixes(targets.iter().map(|&t| t.to_owned()).collect()),
        modules_to_save: Vec::new(),
        rank_pattern: BTreeMap::new(),
        alpha_pattern: BTreeMap::new(),
        token_rows: Vec::new(),
        untied_tokens: None,
        base_model: None,
    }
}

fn starcoder() -> ModelConfig {
    ModelConfig::preset("starcoder").unwrap()
}

/// The figures that the published run printed.
#[test]
fn the_originals_adapter_on_starcoder_is_counted_exactly() {
    let config = config(&["c_proj", "c_attn", "q_attn", "c_fc", "c_proj"]);
    let model = starcoder();
    let plan = config.plan(&model).unwrap();
    assert_eq!(plan.trainable(), 110_428_160);
    assert_eq!(plan.all_parameters(&model), 15_627_884_544);
    let percent = 100.0 * plan.trainable() as f64 / plan.all_parameters(&model) as f64;
    assert_eq!(format!("{percent}"), "0.7066097761926236");
    assert_eq!(plan.unmatched, ["q_attn"], "q_attn is only there for cross attention");
    let of_blocks: u64 = (0..model.layers).flat_map(|b| plan.block_parameters(b)).map(|p| p.elements()).sum();
    assert_eq!(of_blocks, plan.trainable());
    assert!(plan.embed_parameters().is_empty());
}

#[test]
fn a_suffix_matches_after_a_dot_and_a_pattern_the_whole_name() {
    let model = starcoder();
    let count = |targets: Targets| {
        LoraConfig { targets, ..config(&[]) }.plan(&model).map(|plan| plan.linears.len()).unwrap_or(0)
    };
    let suffix = |text: &str| count(Targets::Suffixes(vec![text.to_owned()]));
    assert_eq!(suffix("c_proj"), 80);
    assert_eq!(suffix("mlp.c_proj"), 40);
    assert_eq!(suffix("proj"), 0);
    assert_eq!(suffix("transformer.h.7.attn.c_attn"), 1);
    let pattern = |text: &str| count(Targets::Pattern(text.to_owned()));
    assert_eq!(pattern("all-linear"), 160);
    assert_eq!(pattern(r".*\.h\.[0-3]\.attn\.c_attn"), 4);
    assert_eq!(pattern("c_attn"), 0);
}

#[test]
fn what_matches_nothing_or_cannot_be_trained_is_refused_by_name() {
    let model = starcoder();
    let message = |config: LoraConfig| config.plan(&model).unwrap_err().to_string();
    let nothing = message(config(&["q_proj"]));
    assert!(nothing.contains("[q_proj] match no linear"), "{nothing}");
    assert!(nothing.contains("attn.c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj"), "{nothing}");
    assert!(message(config(&["c_attn", "lm_head"])).contains("lm_head"));
    let saved = |name: &str| LoraConfig { modules_to_save: vec![name.to_owned()], ..config(&["c_attn"]) };
    assert!(message(saved("ln_9")).contains("matches no module"));
    assert!(message(saved("h.40.ln_1")).contains("matches no module"));
    assert_eq!(saved("h.39.ln_1").plan(&model).unwrap().block_parameters(39).len(), 4);
    assert!(message(saved("lm_head")).contains("untie"));
    assert!(message(saved("c_attn")).contains("keep one"));
    let pattern = LoraConfig { targets: Targets::Pattern("(".to_owned()), ..config(&[]) };
    assert!(message(pattern).contains("regular expression"));
}

#[test]
fn whole_modules_ranks_and_scalings_follow_the_config() {
    let model = starcoder();
    let config = LoraConfig {
        rslora: true,
        dora: true,
        modules_to_save: vec!["ln_1".to_owned(), "ln_f".to_owned()],
        rank_pattern: [("mlp.c_fc".to_owned(), 4)].into(),
        alpha_pattern: [("c_attn".to_owned(), 8.0)].into(),
        ..config(&["c_attn", "c_fc"])
    };
    let plan = config.plan(&model).unwrap();
    let of = |name: &str| plan.linears.iter().find(|linear| linear.name == name).unwrap();
    assert_eq!((of("attn.c_attn").rank, of("attn.c_attn").scaling), (32, 8.0 / 32f64.sqrt()));
    assert_eq!((of("mlp.c_fc").rank, of("mlp.c_fc").scaling), (4, 64.0 / 2.0));
    let names: Vec<String> = plan.block_parameters(1).into_iter().map(|p| p.hf_name).collect();
    let prefix = "base_model.model.transformer.h.1.";
    let expected = [
        "attn.c_attn.lora_A.weight",
        "attn.c_attn.lora_B.weight",
        "attn.c_attn.lora_magnitude_vector",
        "mlp.c_fc.lora_A.weight",
        "mlp.c_fc.lora_B.weight",
        "mlp.c_fc.lora_magnitude_vector",
        "ln_1.weight",
        "ln_1.bias",
    ];
    assert_eq!(names, expected.map(|name| format!("{prefix}{name}")));
    let embed: Vec<String> = plan.embed_parameters().into_iter().map(|p| p.name).collect();
    assert_eq!(embed, ["ln_f.weight", "ln_f.bias"]);
}

#[test]
fn a_config_survives_pefts_format_and_pefts_defaults_hold() {
    let config = LoraConfig {
        rank_pattern: [("c_fc".to_owned(), 4)].into(),
        alpha_pattern: [("c_fc".to_owned(), 2.5)].into(),
        modules_to_save: vec!["ln_f".to_owned()],
        base_model: Some("bigcode/starcoder".to_owned()),
        ..config(&["c_attn"])
    };
    let text = config.to_peft_json().to_string();
    assert_eq!(LoraConfig::from_peft_json(&text).unwrap(), config);
    let least = LoraConfig::from_peft_json("{\"unknown\": 1}").unwrap();
    assert_eq!((least.rank, least.alpha, least.dropout), (8, 8.0, 0.0));
    for (text, key) in [
        ("{\"peft_type\": \"IA3\"}", "peft_type"),
        ("{\"r\": 0}", "r: 0"),
        ("{\"bias\": \"all\"}", "bias"),
        ("{\"lora_bias\": true}", "lora_bias"),
        ("{\"target_modules\": [1]}", "target_modules"),
        ("[]", "the file"),
    ] {
        let message = LoraConfig::from_peft_json(text).unwrap_err().to_string();
        assert!(message.contains(key), "{message}");
    }
}

proptest::proptest! {
    #[test]
    fn arbitrary_configs_never_panic(text in "[\\{\\}\\[\\]\":,a-z_0-9 .]{0,80}") {
        let _ = LoraConfig::from_peft_json(&text);
    }
}

#[test]
fn rows_of_added_tokens_are_trained_and_named_as_in_peft() {
    let model =
        ModelConfig { vocab_size: 50, added_tokens: vec![47, 49], ..ModelConfig::preset("tiny").unwrap() };
    let tied = config(&["c_attn"]).with_added_tokens(&model);
    let plan = tied.plan(&model).unwrap();
    let [rows] = &plan.embed_parameters()[..] else { panic!("{:?}", plan.embed_parameters()) };
    assert_eq!(rows.hf_name, "base_model.model.transformer.wte.token_adapter.trainable_tokens_delta");
    assert_eq!(rows.shape, [2, model.hidden_size]);
    let without = config(&["c_attn"]).plan(&model).unwrap();
    assert_eq!(plan.trainable(), without.trainable() + 2 * model.hidden_size);
    assert_eq!(tied.to_peft_json()["trainable_token_indices"], serde_json::json!([47, 49]));
    let read = LoraConfig::from_peft_json(&tied.to_peft_json().to_string()).unwrap();
    assert_eq!((&read.token_rows, &read.untied_tokens), (&vec![47, 49], &None));

    // Where the head is another table, its rows are trained as well.
    let untied = ModelConfig {
        added_tokens: vec![7],
        tied_head: false,
        ..ModelConfig::preset("qwen2.5-coder-0.5b").unwrap()
    };
    let lora = config(&["q_proj"]).with_added_tokens(&untied);
    let names: Vec<String> =
        lora.plan(&untied).unwrap().embed_parameters().into_iter().map(|p| p.hf_name).collect();
    assert_eq!(
        names,
        [
            "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta",
            "base_model.model.lm_head.token_adapter.trainable_tokens_delta",
        ]
    );
    let json = lora.to_peft_json();
    assert_eq!(json["trainable_token_indices"], serde_json::json!({ "embed_tokens": [7], "lm_head": [7] }));
    let read = LoraConfig::from_peft_json(&json.to_string()).unwrap();
    assert_eq!((read.token_rows, read.untied_tokens.as_deref()), (vec![7], Some("embed_tokens")));

    for (indices, rule) in [
        ("[3, 1]", "in ascending order"),
        ("[1, 1]", "in ascending order"),
        (r#"{"embed_tokens": [1], "lm_head": [2]}"#, "the same for each table"),
        ("[-1]", "in ascending order"),
    ] {
        let error =
            LoraConfig::from_peft_json(&format!(r#"{{"trainable_token_indices": {indices}}}"#)).unwrap_err();
        assert!(error.to_string().contains(rule), "{error}");
    }
    let small = ModelConfig { vocab_size: 48, added_tokens: Vec::new(), ..model };
    let error = tied.plan(&small).unwrap_err().to_string();
    assert!(error.contains("row 49 is none of the 48") && error.contains("init-chat"), "{error}");
}
