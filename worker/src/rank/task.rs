//! What a rank does: one arm for each kind of task.

use std::sync::Arc;
use std::time::Duration;

use tch::Device;
use tunefleet_hub::model::Model;
use tunefleet_proto::ids::{Attempt, Rank};
use tunefleet_proto::job::{JobSpec, ModelSpec, Precision, TokenizerSpec};
use tunefleet_proto::rpc::Stage;
use tunefleet_proto::shard_plan::ShardPlan;

use super::Error;
use super::group::Listener;
use super::session::Session;
use crate::checkpoint::hugging_face;
use crate::comm::dump::Reporter;
use crate::comm::recorder::Record;
use crate::data::documents::Dataset;
use crate::data::{tokenizer, train_tokenizer};
use crate::fault::{self, Phase};
use crate::train::{self, Host as _, Outcome};
use crate::{chat, evaluate, export, init_model, memory, serve};

/// Longest time between the first rank that is done with its share of an evaluation and the last.
const EVALUATION_LIMIT: Duration = Duration::from_secs(7 * 24 * 3600);

/// Runs the session's assignment.
pub(super) fn run(session: &Session) -> Result<Outcome, Error> {
    let assignment = &session.assignment;
    let stage = assignment.task.as_ref().map_or(Stage::Unspecified, |task| task.stage());
    let spec: JobSpec = parse("job spec", &assignment.spec_json)?;
    tch::set_num_threads(i32::try_from(assignment.threads.max(1)).unwrap_or(i32::MAX));
    let device = match assignment.cuda_device {
        Some(index) => Device::Cuda(index as usize),
        None => Device::Cpu,
    };

    // For the log, beside what the plan said.
    memory::count(device).map_err(train::Error::from)?;
    fault::attempt(assignment.task.as_ref().map_or(0, |task| task.attempt));
    let listener = Listener::open(assignment)?;
    let start = session.wait_for_start(listener.address())?;
    match stage {
        Stage::Train => {
            let plan: ShardPlan = parse("shard plan", &assignment.shard_plan_json)?;
            fault::at(assignment.rank, 0);
            fault::point(Phase::Start);
            let record = Arc::new(Record::new(plan.units.iter().map(|unit| unit.name.clone()).collect()));
            let timeout = Duration::from_secs(spec.train.collective_timeout_seconds);
            let groups = listener.join(assignment, &start, spec.train.shard_ranks, &record, timeout)?;
            let rank = Rank { rank: assignment.rank, world: assignment.world };
            let attempt = Attempt(assignment.task.as_ref().map_or(0, |task| task.attempt));
            let reporter = Reporter::new(record, rank, &spec.output, attempt);
            let _watchdog = session.watch_over(groups.clone(), reporter, timeout)?;
            let outcome = train::run(&spec, &plan, groups.mesh(), device, assignment.resume, &session.host)?;
            let peak_bytes = memory::tensors(device).map_err(train::Error::from)?.peak_bytes;
            tracing::info!("tensors took {peak_bytes} bytes at most");
            Ok(outcome)
        }
        Stage::Tokenizer => train_tokenizer_stage(&spec),
        Stage::InitModel => init_model_stage(&spec),
        Stage::Export => {
            export::export_job(&spec)?;
            Ok(Outcome::Finished)
        }
        Stage::Evaluate => {
            let record = Arc::new(Record::new(Vec::new()));
            let rank = Rank { rank: assignment.rank, world: assignment.world };
            // Shares take as long as they take: nobody waits but who is done.
            let groups = listener.join(assignment, &start, rank.world, &record, EVALUATION_LIMIT)?;
            let attempt = Attempt(assignment.task.as_ref().map_or(0, |task| task.attempt));
            let reporter = Reporter::new(record, rank, &spec.output, attempt);
            let _watchdog = session.watch_over(groups.clone(), reporter, EVALUATION_LIMIT)?;
            let tell = |line| session.host.report(train::Event::Note(line));
            evaluate::stage::run(&spec, device, rank, groups.mesh().world, &tell)?;
            Ok(Outcome::Finished)
        }
        Stage::Serve => {
            serve::run_job(&spec, device, || session.host.stop_requested())?;
            Ok(Outcome::Stopped(spec.train.steps))
        }
        Stage::Collect | Stage::Unspecified => {
            Err(Error::Assignment(format!("a worker has no task {:?}", stage.name())))
        }
    }
}

fn train_tokenizer_stage(spec: &JobSpec) -> Result<Outcome, Error> {
    if let TokenizerSpec::Train { vocab_size } = spec.tokenizer {
        let dataset = Dataset::open(&spec.dataset_dir()).map_err(tokenizer::Error::from)?;
        train_tokenizer::train_on_dataset(&dataset, vocab_size, &spec.base_tokenizer_dir())?;
    }
    Ok(Outcome::Finished)
}

fn init_model_stage(spec: &JobSpec) -> Result<Outcome, Error> {
    match &spec.model {
        ModelSpec::Init { preset, seed } => {
            let tokenizer = match spec.tokenizer {
                TokenizerSpec::FromModel => None,
                _ => Some(spec.base_tokenizer_dir()),
            };
            init_model::init(preset, tokenizer.as_deref(), *seed, Precision::Fp32, &spec.base_model_dir())?;
        }
        ModelSpec::Hub { repo, revision } => {
            let snapshot = Model { repo, revision: revision.as_deref() }.fetch()?;
            tracing::info!("{repo} is at commit {}", snapshot.commit);
            hugging_face::link(&snapshot.dir, &spec.base_model_dir())?;
        }
        ModelSpec::Existing(_) => {}
    }
    if let Some(chat) = &spec.data.chat {
        let (model, tokenizer) = (spec.base_model_dir(), spec.base_tokenizer_dir());
        let made = chat::model::init(chat, &model, &tokenizer, &spec.model_dir())?;
        tracing::info!("tokens that were added: {:?}", made.added);
    }
    Ok(Outcome::Finished)
}

fn parse<T: serde::de::DeserializeOwned>(what: &str, json: &str) -> Result<T, Error> {
    serde_json::from_str(json).map_err(|error| Error::Assignment(format!("{what}: {error}")))
}
