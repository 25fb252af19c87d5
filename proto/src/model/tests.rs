use proptest::prelude::*;

use super::*;

fn count(name: &str) -> u64 {
    ModelConfig::preset(name).unwrap().parameter_count()
}

/// StarCoder's and DeciCoder's were published; the others are what transformers counts of the published shapes.
#[test]
fn published_shapes_have_their_parameter_counts() {
    for (name, parameters) in
        [("starcoder", 15_517_456_384), ("starcoderbase-1b", 1_137_207_296), ("decicoder-1b", 1_113_671_680)]
    {
        assert_eq!(count(name), parameters, "{name}");
    }
}

#[test]
fn every_preset_survives_its_own_json() {
    for name in PRESETS {
        let config = ModelConfig::preset(name).unwrap();
        let text = config.to_json("bfloat16").to_string();
        assert_eq!(ModelConfig::from_json(&text).unwrap(), config, "{name}");
    }
}

#[test]
fn parameters_stand_where_the_layout_says() {
    for name in PRESETS {
        let config = ModelConfig::preset(name).unwrap();
        let (layout, parameters) = (config.embed_layout(), config.embed_parameters());
        let name_at = |index: usize| parameters[index].hf_name.as_str();
        assert!(name_at(layout.tokens).contains("wte") || name_at(layout.tokens).contains("embed_tokens"));
        assert_eq!(layout.head == layout.tokens, config.tied_head, "{name}");
        assert!(config.tied_head || name_at(layout.head) == "lm_head.weight", "{name}");
        assert_eq!(layout.norm_bias.unwrap_or(layout.norm_weight) + 1, parameters.len(), "{name}");
        let block = config.block_parameters(1);
        for (linear, parameter) in config.linears().iter().zip(&block) {
            assert_eq!(parameter.shape, [linear.out_features, linear.in_features], "{name}");
            assert!(parameter.name.starts_with(linear.name) && parameter.decays, "{name}");
        }
        assert!(block[config.linears().len()..].iter().all(|parameter| !parameter.decays), "{name}");
    }
}

const LLAMA: &str = r#""model_type":"llama","vocab_size":9,"hidden_size":32,"num_attention_heads":4,
    "num_hidden_layers":2,"intermediate_size":8"#;

#[test]
fn bad_configs_are_refused_by_key_and_rule() {
    let starcoder = r#""model_type":"gpt_bigcode","n_head":4"#;
    let cases = [
        ("[]".to_owned(), "not a JSON object"),
        ("{}".to_owned(), "lacks model_type"),
        (
            r#"{"model_type":"mamba"}"#.to_owned(),
            "model_type \"mamba\" is not supported; supported: gpt_bigcode, starcoder2, qwen2, llama, decicoder",
        ),
        (format!("{{{starcoder}}}"), "lacks n_embd"),
        (format!(r#"{{{starcoder},"n_embd":-3}}"#), "n_embd = -3"),
        (
            format!(r#"{{{starcoder},"n_embd":30,"n_layer":1,"vocab_size":9}}"#),
            "must be a multiple of n_head (4)",
        ),
        (
            format!(r#"{{{starcoder},"n_embd":32,"activation_function":"relu"}}"#),
            "activation_function = relu: must be gelu or gelu_pytorch_tanh",
        ),
        (format!(r#"{{{starcoder},"n_embd":32,"multi_query":1}}"#), "multi_query = 1: must be true or false"),
        (format!(r#"{{{starcoder},"n_embd":32,"add_cross_attention":true}}"#), "without cross attention"),
        (format!(r#"{{{LLAMA},"hidden_act":"relu"}}"#), "hidden_act = relu: must be silu"),
        (format!(r#"{{{LLAMA},"num_key_value_heads":3}}"#), "num_key_value_heads = 3: must divide"),
        (format!(r#"{{{LLAMA},"head_dim":7}}"#), "head_dim = 7: must be even"),
        (
            format!(r#"{{{LLAMA},"head_dim":1048576}}"#),
            "head_dim = 1048576: times the number of query heads (4)",
        ),
        (format!(r#"{{{LLAMA},"num_key_value_heads":0}}"#), "must be a whole number from 1"),
        (format!(r#"{{{LLAMA},"quantization_config":{{}}}}"#), "weights must not be quantised"),
        (
            format!(r#"{{{LLAMA},"rope_scaling":{{"type":"longrope"}}}}"#),
            "rope_type = longrope: is not supported",
        ),
        (format!(r#"{{{LLAMA},"rope_scaling":{{"type":"linear"}}}}"#), "lacks factor"),
        (
            format!(r#"{{{LLAMA},"rope_scaling":{{"type":"linear","factor":0.5}}}}"#),
            "factor = 0.5: must be at least 1",
        ),
        (format!(r#"{{{LLAMA},"rope_scaling":4}}"#), "rope_scaling = 4: must be an object"),
        (
            format!(
                r#"{{{LLAMA},"rope_theta":1e4,"rope_parameters":{{"rope_type":"default","rope_theta":1e6}}}}"#
            ),
            "contradicts rope_theta = 1000000",
        ),
        (
            format!(
                r#"{{{LLAMA},"rope_scaling":{{"rope_type":"llama3","factor":8,"low_freq_factor":4,"high_freq_factor":4}}}}"#
            ),
            "high_freq_factor = 4.0: must be greater than low_freq_factor (4)",
        ),
        (
            format!(
                r#"{{{LLAMA},"rope_scaling":{{"type":"linear","factor":2,"partial_rotary_factor":0.5}}}}"#
            ),
            "only whole heads are rotated",
        ),
        (
            format!(r#"{{{},"layer_types":["full_attention"]}}"#, LLAMA.replace("llama", "qwen2")),
            "must name a type for each of 2 layers",
        ),
        (
            format!(
                r#"{{{},"layer_types":["sliding_attention","full_attention"]}}"#,
                LLAMA.replace("llama", "qwen2")
            ),
            "full_attention behind sliding_attention",
        ),
        (
            format!(r#"{{{},"norm_type":"rms_norm"}}"#, LLAMA.replace("llama", "starcoder2")),
            "norm_type = rms_norm: must be layer_norm",
        ),
    ];
    for (text, expected) in cases {
        let message = ModelConfig::from_json(&text).unwrap_err().to_string();
        assert!(message.contains(expected), "{text}: {message}");
    }
}

#[test]
fn a_decicoder_is_a_llama_under_another_name() {
    let text = format!(r#"{{{},"naive_attention_prefill":false}}"#, LLAMA.replace("llama", "decicoder"));
    let config = ModelConfig::from_json(&text).unwrap();
    assert_eq!(config, ModelConfig::from_json(&format!("{{{LLAMA}}}")).unwrap());
    assert_eq!(config.to_json("float32")["model_type"], "llama");
}

#[test]
fn the_first_of_several_ends_of_text_counts() {
    let config = ModelConfig::from_json(&format!(r#"{{{LLAMA},"eos_token_id":[7,8]}}"#)).unwrap();
    assert_eq!(config.eos_token_id, Some(7));
}

#[test]
fn windows_begin_where_the_config_says() {
    let qwen = LLAMA.replace("llama", "qwen2");
    let window = |more: &str| {
        let config = ModelConfig::from_json(&format!("{{{qwen}{more}}}")).unwrap();
        [config.window_of(0), config.window_of(1)]
    };
    assert_eq!(window(""), [None, None]);
    assert_eq!(window(r#","sliding_window":5,"max_window_layers":1"#), [None, None]);
    let used = r#","use_sliding_window":true,"sliding_window":5,"max_window_layers":1"#;
    assert_eq!(window(used), [None, Some(5)]);
    let named = r#","use_sliding_window":true,"sliding_window":5,"layer_types":["sliding_attention","sliding_attention"]"#;
    assert_eq!(window(named), [Some(5), Some(5)]);
}

const KINDS: [&str; 5] = ["linear", "yarn", "llama3", "dynamic", "longrope"];

/// Keys of all families, and values that may stand there.
fn any_config() -> impl Strategy<Value = String> {
    let keys = [
        "n_embd",
        "n_head",
        "n_layer",
        "n_inner",
        "n_positions",
        "multi_query",
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "num_hidden_layers",
        "intermediate_size",
        "max_position_embeddings",
        "head_dim",
        "vocab_size",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "sliding_window",
        "use_sliding_window",
        "max_window_layers",
        "layer_types",
        "rms_norm_eps",
        "tie_word_embeddings",
        "hidden_act",
        "eos_token_id",
    ];
    let number = prop_oneof![0u64..9, Just(1 << 20), any::<u64>()];
    let value = prop_oneof![
        6 => number.clone().prop_map(|n| n.to_string()),
        1 => any::<f64>().prop_map(|x| serde_json::json!(x).to_string()),
        1 => Just("null".to_owned()),
        1 => any::<bool>().prop_map(|b| b.to_string()),
        1 => Just("[\"sliding_attention\"]".to_owned()),
        2 => (number, any::<f64>()).prop_map(|(n, x)| serde_json::json!({
            "type": KINDS[(n % 5) as usize], "factor": x,
            "original_max_position_embeddings": n, "low_freq_factor": 1, "high_freq_factor": x, "rope_theta": x,
        }).to_string()),
    ];
    let family = prop::sample::select(vec!["gpt_bigcode", "starcoder2", "qwen2", "llama", "decicoder"]);
    let entries = prop::collection::vec((prop::sample::select(keys.to_vec()), value), 0..keys.len());
    (family, entries).prop_map(|(family, entries)| {
        let entries: Vec<String> = entries.iter().map(|(key, value)| format!("{key:?}:{value}")).collect();
        // What all need, so that some are read; the last of two counts.
        let needed = "\"n_embd\":8,\"n_head\":2,\"n_layer\":1,\"hidden_size\":8,\"num_attention_heads\":2,\
                      \"num_hidden_layers\":1,\"intermediate_size\":8,\"vocab_size\":9";
        format!(
            "{{\"model_type\":{family:?},{needed}{}{}}}",
            if entries.is_empty() { "" } else { "," },
            entries.join(",")
        )
    })
}

proptest! {
    #[test]
    fn whatever_a_config_says_it_is_counted_or_refused(text in any_config()) {
        if let Ok(config) = ModelConfig::from_json(&text) {
            prop_assert!(config.parameter_count() > 0);
            prop_assert!(config.block_parameters(0).len() > config.linears().len());
            if let Positions::Rotary(rope) = &config.positions {
                prop_assert_eq!(rope.inverse_frequencies(config.head_dim()).len() as u64, config.head_dim() / 2);
            }
            let again = ModelConfig::from_json(&config.to_json("float32").to_string()).unwrap();
            prop_assert_eq!(again.block_parameters(0), config.block_parameters(0));
        }
    }
}

#[test]
fn added_tokens_are_rows_of_the_embedding_in_order() {
    let config = ModelConfig { added_tokens: vec![3, 5], ..ModelConfig::preset("tiny").unwrap() };
    assert_eq!(ModelConfig::from_json(&config.to_json("float32").to_string()).unwrap(), config);
    for added in ["[5, 3]", "[3, 3]", "[99999999]", "7", "[\"a\"]"] {
        let text = format!(r#"{{{LLAMA},"tunefleet_added_tokens":{added}}}"#);
        let error = ModelConfig::from_json(&text).unwrap_err().to_string();
        assert!(error.contains("tunefleet_added_tokens") && error.contains("ascending"), "{error}");
    }
}
