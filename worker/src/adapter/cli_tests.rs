use clap::Parser;

use super::super::support::{adapter, config, deltas, relative};
use super::*;

#[derive(Debug, Parser)]
#[command(name = "adapter")]
struct Program {
    #[command(flatten)]
    args: Args,
}

fn parse(line: &str) -> Result<Args, clap::Error> {
    Program::try_parse_from(std::iter::once("adapter").chain(line.split(' '))).map(|program| program.args)
}

#[test]
fn an_unknown_combination_is_answered_with_all_and_the_nearest() {
    let message = parse("combine --adapter a --out b --combination tie").unwrap_err().to_string();
    for name in ["'ties'", "cat", "svd", "linear", "ties_svd", "dare_linear_svd", "magnitude_prune"] {
        assert!(message.contains(name), "{name}: {message}");
    }
}

#[test]
fn the_verbs_run_one_after_another() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let (a, b) = (adapter(config(4, 8.0, &["c_attn"])), adapter(config(2, 8.0, &["c_fc"])));
    a.write(&dir.path().join("a"), WriteDtype::F32).unwrap();
    b.write(&dir.path().join("b"), WriteDtype::F32).unwrap();
    let go = |line: String| run(parse(&line).unwrap());
    let (a_path, b_path) = (path("a"), path("b"));
    go(format!("combine --adapter {a_path} --weight -0.5 --adapter {b_path} --weight 2 --out {}", path("c")))
        .unwrap();
    let combined = files::read(&dir.path().join("c")).unwrap();
    for (module, delta) in deltas(&a) {
        assert!(relative(&deltas(&combined)[&module], &(delta * -0.5)) < 1e-6, "{module}");
    }
    go(format!("scale --adapter {} --weight -2 --bake --dtype bf16 --out {}", path("c"), path("d"))).unwrap();
    go(format!("diff {} {} --json", path("c"), path("d"))).unwrap();
    go(format!("inspect {}", path("d"))).unwrap();
    let message = |line: String| go(line).unwrap_err().to_string();
    let weights =
        message(format!("combine --adapter {a_path} --weight 1 --adapter {b_path} --out {}", path("e")));
    assert!(weights.contains("1 --weight for 2 --adapter"), "{weights}");
    let merge = format!("merge --adapter {a_path} --model {} --out {}", path("m"), path("o"));
    for wrong in ["nf4-63", "int4", "plain"] {
        assert!(
            parse(&format!("{merge} --quantize {wrong}")).unwrap_err().to_string().contains("nf4-64-double")
        );
    }
    // Made by another program, it does not say what it was trained on.
    assert!(message(format!("{merge} --base dequantized")).contains("give --quantize"));
}
