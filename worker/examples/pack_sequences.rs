//! Texts to sequences: our side of the comparison with `tests/bench/peer_pack.py`. Tokenises a dataset anew, then reads
//! every sequence of the first epoch. Prints a JSON object with tokens and seconds.
#![forbid(unsafe_code)]

use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

use clap::Parser;
use serde_json::json;
use tunefleet_proto::job::{DataSpec, FimLevel, Packing};
use tunefleet_worker::data::{Sequences, Split};

#[derive(Debug, Parser)]
struct Args {
    dataset: PathBuf,
    tokenizer: PathBuf,
    #[arg(long, default_value_t = 2048)]
    sequence: u32,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args = Args::parse();
    let spec = DataSpec {
        sequence_tokens: args.sequence,
        fim_rate: 0.5,
        fim_spm_rate: 0.5,
        fim_level: FimLevel::Window,
        packing: Packing::Continuous,
        metadata_prefix: false,
        document_mask: false,
        chat: None,
        seed: 0,
    };
    let cache = tempfile::tempdir()?;
    let began = Instant::now();
    let sequences = Sequences::open(&spec, &args.dataset, &args.tokenizer, Split::Train, cache.path())?;
    let opened = began.elapsed().as_secs_f64();
    let mut tokens = 0;
    for index in 0..sequences.len_per_epoch() {
        tokens += sequences.sequence(index)?.tokens.len();
    }
    let seconds = began.elapsed().as_secs_f64();
    let line = json!({ "tokens": tokens, "seconds": seconds, "tokenise_seconds": opened });
    writeln!(std::io::stdout(), "{line}")?;
    Ok(())
}
