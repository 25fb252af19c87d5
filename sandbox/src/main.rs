//! `sandbox supervise` runs one program, asked for on stdin; `sandbox enter` is that program's own process before it
//! becomes the program. Neither is for people: the library starts them.

#![forbid(unsafe_code)]

use std::io::{Read as _, Write as _};
use std::process::ExitCode;

use tunefleet_sandbox::{Answer, Request, enter, supervise};

/// Longest request that is read: programs are short.
const MAX_REQUEST_BYTES: u64 = 64 << 20;

fn main() -> ExitCode {
    let verb = std::env::args().nth(1).unwrap_or_default();
    let outcome = match verb.as_str() {
        "supervise" => answer(),
        // Only comes back where it failed.
        "enter" => Err(enter::run(std::env::args().nth(2).unwrap_or_default().as_bytes())),
        _ => Err("usage: sandbox supervise < request.json".to_owned()),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(cause) => {
            eprintln!("{}{cause}", if verb == "enter" { supervise::REFUSAL_MARK } else { "sandbox: " });
            ExitCode::from(supervise::REFUSED_CODE)
        }
    }
}

fn answer() -> Result<(), String> {
    let mut bytes = Vec::new();
    std::io::stdin()
        .take(MAX_REQUEST_BYTES)
        .read_to_end(&mut bytes)
        .map_err(|error| format!("reading the request: {error}"))?;
    let request: Request =
        serde_json::from_slice(&bytes).map_err(|error| format!("the request on stdin: {error}"))?;
    let answer = supervise::run(request).map_or_else(Answer::Refused, Answer::Ran);
    let answer = serde_json::to_vec(&answer).map_err(|error| error.to_string())?;
    std::io::stdout().write_all(&answer).map_err(|error| format!("writing the answer: {error}"))
}
