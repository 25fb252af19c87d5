use tch::Device;
use tunefleet_proto::adapter::LoraConfig;

use super::super::files;
use super::super::support::{adapter, config, deltas, norm, relative};
use super::*;
use crate::checkpoint::safetensors::WriteDtype;

fn options(combination: Combination) -> Options {
    Options {
        combination,
        rank: None,
        density: None,
        majority_sign: MajoritySign::Total,
        seed: 0,
        peft_compat: false,
    }
}

fn parts(list: Vec<(LoraConfig, f64)>) -> Vec<Part> {
    let part =
        |(i, (config, weight))| Part { name: format!("adapter-{i}"), adapter: adapter(config), weight };
    list.into_iter().enumerate().map(part).collect()
}

/// The true weighted sum of whole differences.
fn truth(parts: &[Part]) -> BTreeMap<String, Tensor> {
    let mut out = BTreeMap::new();
    for part in parts {
        for (module, delta) in deltas(&part.adapter) {
            let weighted = delta * part.weight;
            let sum = match out.remove(&module) {
                Some(sum) => sum + weighted,
                None => weighted,
            };
            out.insert(module, sum);
        }
    }
    out
}

/// Different ranks, scalings, targets and signs.
fn mixed() -> Vec<Part> {
    parts(vec![
        (config(32, 64.0, &["c_attn", "c_proj", "c_fc"]), 0.7),
        (LoraConfig { rslora: true, ..config(8, 16.0, &["c_attn", "mlp.c_proj"]) }, -1.3),
    ])
}

/// Through the disk and back: what is written says of itself what it is.
fn stored(combined: &Combined) -> Adapter {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    combined.adapter.write(&out, WriteDtype::F32).unwrap();
    files::read_for(&out, &super::super::support::model()).unwrap().0
}

#[test]
fn cat_of_different_ranks_is_the_sum_of_differences() {
    let parts = mixed();
    let combined = combine(&parts, options(Combination::Cat)).unwrap();
    assert_eq!(combined.truncation_error, None);
    let found = stored(&combined);
    assert!(found.pairs().unwrap().iter().all(|(_, pair)| pair.scaling == 1.0));
    assert_eq!(found.config.rank, 40, "{:?}", found.config);
    let expected: BTreeMap<String, u64> =
        [("attn.c_proj".to_owned(), 32), ("mlp.c_fc".to_owned(), 32)].into();
    assert_eq!(found.config.rank_pattern, expected);
    let (found, truth) = (deltas(&found), truth(&parts));
    assert_eq!(found.len(), truth.len());
    for (module, delta) in truth {
        let error = relative(&found[&module], &delta);
        assert!(error < 1e-6, "{module}: {error}");
    }
}

#[test]
fn svd_is_exact_at_full_rank_and_reports_what_it_cuts_off() {
    let parts = mixed();
    let truth = truth(&parts);
    let whole = combine(&parts, Options { rank: Some(40), ..options(Combination::Svd) }).unwrap();
    for (module, delta) in deltas(&stored(&whole)) {
        assert!(relative(&delta, &truth[&module]) < 1e-6, "{module}");
    }
    assert!(whole.truncation_error.unwrap() < 1e-7);
    for rank in [1, 5, 20] {
        let cut = combine(&parts, Options { rank: Some(rank), ..options(Combination::Svd) }).unwrap();
        let found = deltas(&stored(&cut));
        let (mut errors, mut squares) = (0.0, 0.0);
        for outcome in &cut.modules {
            let delta = &truth[&outcome.module];
            let measured = relative(&found[&outcome.module], delta);
            let reported = outcome.truncation_error.unwrap();
            assert!((measured - reported).abs() < 1e-6, "{}: {measured} {reported}", outcome.module);
            let (_, s, _) = delta.svd(true, true);
            let best = norm(&s.narrow(0, rank as i64, s.size()[0] - rank as i64)) / norm(delta);
            assert!((measured - best).abs() < 1e-6, "{measured} is not the best possible {best}");
            errors += norm(&(&found[&outcome.module] - delta)).powi(2);
            squares += norm(delta).powi(2);
        }
        let overall = cut.truncation_error.unwrap();
        assert!((overall - (errors / squares).sqrt()).abs() < 1e-6);
    }
}

#[test]
fn one_adapter_by_linear_or_cat_is_exactly_scaled() {
    for combination in [Combination::Linear, Combination::Cat] {
        for weight in [0.8, -0.8] {
            let parts = parts(vec![(config(4, 12.0, &["c_attn"]), weight)]);
            let found = deltas(&stored(&combine(&parts, options(combination)).unwrap()));
            for (module, delta) in truth(&parts) {
                assert!(relative(&found[&module], &delta) < 1e-6, "{module}");
            }
        }
    }
}

#[test]
fn methods_on_differences_follow_their_definition() {
    let parts = parts(vec![(config(4, 8.0, &["c_attn"]), 1.0), (config(2, 3.0, &["c_attn"]), 0.5)]);
    let with = |combination| Options { rank: Some(64), density: Some(0.4), ..options(combination) };
    let pruned = |delta: &Tensor| {
        let kept = (0.4 * delta.numel() as f64) as i64;
        let (values, _) = delta.abs().view([-1]).topk(kept, 0, true, true);
        let least = values.double_value(&[kept - 1]);
        delta * delta.abs().ge(least)
    };
    let deltas_of: Vec<_> = parts.iter().map(|part| deltas(&part.adapter)).collect();
    let magnitude = deltas(&stored(&combine(&parts, with(Combination::MagnitudePruneSvd)).unwrap()));
    let ties = deltas(&stored(&combine(&parts, with(Combination::TiesSvd)).unwrap()));
    for module in deltas_of[0].keys() {
        let (a, b) = (pruned(&deltas_of[0][module]), pruned(&deltas_of[1][module]) * 0.5);
        assert!(relative(&magnitude[module], &(&a + &b)) < 1e-4, "{module}");
        let sign: Tensor = (&a + &b).ge(0.0).to_kind(Kind::Double) * 2.0 - 1.0;
        let (of_a, of_b) = (a.sign().eq_tensor(&sign), b.sign().eq_tensor(&sign));
        let count = (of_a.to_kind(Kind::Double) + of_b.to_kind(Kind::Double)).clamp_min(1.0);
        let expected = (a * of_a + b * of_b) / count;
        assert!(relative(&ties[module], &expected) < 1e-4, "{module}");
    }
    let dare = |seed| {
        let combined = combine(&parts, Options { seed, ..with(Combination::DareLinearSvd) }).unwrap();
        deltas(&stored(&combined))
    };
    let (one, again, other) = (dare(1), dare(1), dare(2));
    for (module, delta) in &one {
        assert!(relative(&again[module], delta) < 1e-9);
        assert!(relative(&other[module], delta) > 0.1);
    }
}

#[test]
fn ranks_that_differ_from_block_to_block_are_written_by_name() {
    let one = LoraConfig {
        rank_pattern: [("h.1.attn.c_attn".to_owned(), 3)].into(),
        ..config(4, 8.0, &["c_attn", "c_fc"])
    };
    let parts = parts(vec![(one, 1.0), (config(5, 5.0, &["h.1.attn.c_attn"]), 1.0)]);
    let combined = combine(&parts, options(Combination::Cat)).unwrap();
    let found = stored(&combined);
    assert_eq!(found.config.rank_pattern, [("transformer.h.1.attn.c_attn".to_owned(), 8)].into());
    assert_eq!(found.config.alpha_pattern, [("transformer.h.1.attn.c_attn".to_owned(), 8.0)].into());
    for (module, delta) in truth(&parts) {
        assert!(relative(&deltas(&found)[&module], &delta) < 1e-6);
    }
}

#[test]
fn what_cannot_be_combined_is_refused_with_the_way_out() {
    let message = |list: Vec<(LoraConfig, f64)>, options: Options| {
        combine(&parts(list), options).unwrap_err().to_string()
    };
    let c_attn = |rank| config(rank, 8.0, &["c_attn"]);
    let saved = |rank| LoraConfig { modules_to_save: vec!["ln_f".to_owned()], ..c_attn(rank) };
    let dora = LoraConfig { dora: true, ..c_attn(2) };
    let cat = options(Combination::Cat);
    let cases = [
        (vec![(c_attn(2), 1.0), (dora, 1.0)], cat, "adapter-1: a DoRA adapter cannot be combined"),
        (vec![(c_attn(2), 1.0), (c_attn(4), 1.0)], options(Combination::Linear), "use cat"),
        (vec![(saved(2), 1.0), (saved(2), 1.0)], cat, "both train modules whole"),
        (vec![(saved(2), 0.5), (c_attn(2), 1.0)], cat, "only a weight of 1"),
        (vec![(c_attn(2), f64::NAN)], cat, "finite"),
        (vec![], cat, "at least one"),
        (vec![(c_attn(2), 1.0)], options(Combination::Ties), "--density"),
        (vec![(c_attn(2), 1.0)], Options { density: Some(0.0), ..cat }, "above 0"),
        (vec![(c_attn(2), 1.0)], Options { density: Some(0.5), ..cat }, "this one does not"),
        (vec![(c_attn(2), 1.0)], Options { rank: Some(3), ..cat }, "--rank"),
        (vec![(c_attn(2), 1.0)], Options { rank: Some(0), ..options(Combination::Svd) }, "at least 1"),
    ];
    for (list, options, expected) in cases {
        let message = message(list, options);
        assert!(message.contains(expected), "{expected}: {message}");
    }
    let mut two = parts(vec![(c_attn(2), 1.0), (c_attn(2), 1.0)]);
    let key = pair_keys("transformer.h.0.attn.c_attn").0;
    two[1].adapter.tensors.insert(key, Tensor::randn([2, 65], (Kind::Float, Device::Cpu)));
    let message = combine(&two, cat).unwrap_err().to_string();
    assert!(message.contains("(96, 64) in adapter-0, and (96, 65) in adapter-1"), "{message}");
}

#[test]
fn a_module_trained_whole_and_a_common_base_survive() {
    let mut two = parts(vec![
        (LoraConfig { modules_to_save: vec!["ln_f".to_owned()], ..config(2, 8.0, &["c_attn"]) }, 1.0),
        (config(2, 8.0, &["c_attn"]), 0.5),
    ]);
    for part in &mut two {
        part.adapter.metadata.insert("tunefleet.base_sha256".to_owned(), "ab".to_owned());
    }
    let combined = combine(&two, options(Combination::Cat)).unwrap();
    let found = stored(&combined);
    assert_eq!(found.saved().count(), 2);
    assert_eq!(found.metadata.values().collect::<Vec<_>>(), ["ab"]);
    assert!(combined.notes.is_empty());
    let as_peft = combine(&two, Options { peft_compat: true, ..options(Combination::Cat) }).unwrap();
    assert_eq!(stored(&as_peft).saved().count(), 0);
    assert_eq!(as_peft.notes.len(), 2, "{:?}", as_peft.notes);
    two[1].adapter.metadata.clear();
    two[1].adapter.config.base_model = Some("other".to_owned());
    let combined = combine(&two, options(Combination::Cat)).unwrap();
    assert!(combined.adapter.metadata.is_empty());
    assert_eq!(combined.notes.len(), 2);
}

#[test]
fn rows_of_tokens_stand_as_they_were_trained_and_no_row_is_trained_twice() {
    let rows = |rows: &[u64]| LoraConfig { token_rows: rows.to_vec(), ..config(2, 8.0, &["c_attn"]) };
    let two = parts(vec![(rows(&[40, 49]), 0.5), (rows(&[44]), 1.0), (config(3, 3.0, &["c_attn"]), 1.0)]);
    let combined = combine(&two, options(Combination::Cat)).unwrap();
    assert!(combined.notes[0].contains("rows of 3 tokens"), "{:?}", combined.notes);
    let found = stored(&combined);
    assert_eq!(found.config.token_rows, [40, 44, 49]);
    let of = |adapter: &Adapter| adapter.token_rows().next().unwrap().2.shallow_clone();
    let (first, second) = (of(&two[0].adapter), of(&two[1].adapter));
    let expected = Tensor::stack(&[first.get(0), second.get(0), first.get(1)], 0);
    assert_eq!(of(&found), expected);
    assert_eq!(found.saved().count(), 0);
    let twice = parts(vec![(rows(&[40, 49]), 1.0), (rows(&[49]), 1.0)]);
    let error = combine(&twice, options(Combination::Cat)).unwrap_err().to_string();
    assert!(error.contains("both train the row of token 49"), "{error}");
}
