//! `coordinator doctor`: are a coordinator, its workers and the network between them fit to train?

use std::io::Write as _;
use std::process::ExitCode;

use serde_json::json;
use tunefleet_proto::findings::Findings;
use tunefleet_proto::rpc::DoctorRequest;

use crate::connect::{self, Connect};

/// Command line of `coordinator doctor`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Exit codes: 0 all is well, 1 a warning, 2 something critical, 3 something that is not known and \
                        nothing worse, 5 no coordinator"
)]
pub struct Args {
    #[command(flatten)]
    connect: Connect,
    /// One JSON object a line.
    #[arg(long)]
    json: bool,
}

/// Runs the verb.
pub fn run(args: Args) -> ExitCode {
    connect::block_on(async {
        let mut stream = args.connect.client().await?.doctor(DoctorRequest {}).await?.into_inner();
        let mut found = Vec::new();
        let mut out = std::io::stdout().lock();
        while let Some(finding) = stream.message().await? {
            let line = match args.json {
                true => {
                    let verdict = finding.verdict().word().to_lowercase();
                    let (place, check, detail) = (&finding.place, &finding.check, &finding.detail);
                    format!(
                        "{}\n",
                        json!({"verdict": verdict, "place": place, "check": check, "detail": detail})
                    )
                }
                false => Findings(std::slice::from_ref(&finding)).to_string(),
            };
            // A reader that has gone away wants no more; the exit code says the rest.
            let _ = write!(out, "{line}");
            found.push(finding);
        }
        Ok(Findings(&found).exit_code())
    })
}
