//! Work that the state machine asks for and that takes its time: it runs on threads of its own, and its
//! answer comes back as an input.

use std::sync::Arc;

use tunefleet_proto::job::{DatasetSpec, JobSpec};

use super::fleet::Work;
use super::job::Input;
use super::stage;

/// Does it; a panic is an answer as well.
pub async fn run(spec: Arc<JobSpec>, what: Work) -> Input {
    let done = tokio::task::spawn_blocking(move || match what {
        Work::Inspect(stage, continuation) => {
            let verdict = stage::prepare(&spec, continuation, stage);
            Input::Inspected(stage, verdict.map_err(|error| error.to_string()))
        }
        Work::Collect => Input::Collected(collect(&spec)),
        Work::Record(stage) => {
            Input::Recorded(stage, stage::record(&spec, stage).map_err(|error| error.to_string()))
        }
    });
    done.await.unwrap_or_else(|error| {
        let bug = format!("{error}; this is a bug of the coordinator, please report it with its log");
        match what {
            Work::Inspect(stage, _) => Input::Inspected(stage, Err(bug)),
            Work::Collect => Input::Collected(Err(bug)),
            Work::Record(stage) => Input::Recorded(stage, Err(bug)),
        }
    })
}

fn collect(spec: &JobSpec) -> Result<(), String> {
    match &spec.dataset {
        DatasetSpec::Collect(collect) => {
            let progress = crate::progress::on_stderr();
            let (cache, out) = (spec.output.join("repos"), spec.dataset_dir());
            let done = crate::collect::collect(collect, &cache, &out, progress.as_ref());
            done.map(|_| ()).map_err(|error| error.to_string())
        }
        DatasetSpec::Existing(_) => Ok(()),
    }
}
