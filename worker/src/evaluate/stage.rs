//! The evaluations of a job: each rank has a share of the tasks, and keeps what comes of it in a directory of its own; the
//! first puts all together. What a rank has kept is not asked again in a later attempt.

use std::path::{Path, PathBuf};

use clap::Parser as _;
use tch::Device;
use tunefleet_proto::base_plan::QuantKind;
use tunefleet_proto::evaluation::{BASE, EVALUATION_FILE, Evaluation, Kind, TUNED};
use tunefleet_proto::ids::Rank;
use tunefleet_proto::job::{EvaluateSpec, Exam, JobSpec, MergeBase};

use super::functional::protocol::{Drawing, Protocol};
use super::functional::work::{Share, Work};
use super::functional::{HumanevalArgs, InfillingArgs, JudgeArgs};
use super::repository::{self, Questions};
use super::subject::{Subject, SubjectArgs};
use super::{Error, log, report};
use crate::comm::Communicator;

/// The verbs' own defaults are the job's.
#[derive(clap::Parser)]
struct Defaults<A: clap::Args> {
    #[command(flatten)]
    args: A,
}

fn defaults<A: clap::Args>(flags: &[(&str, &Path)]) -> Result<A, Error> {
    let words = flags.iter().flat_map(|(flag, path)| [flag.into(), path.as_os_str().to_owned()]);
    let words = std::iter::once("evaluate".into()).chain(words);
    Ok(Defaults::try_parse_from(words).map_err(|error| Error::Setting(error.to_string()))?.args)
}

/// Runs this rank's share, and on the first rank puts all shares together and tells what came of them.
///
/// # Errors
/// See [`Error`]; a rank that ends takes the others with it.
pub fn run(
    spec: &JobSpec,
    device: Device,
    rank: Rank,
    world: &dyn Communicator,
    tell: &dyn Fn(String),
) -> Result<(), Error> {
    let Some(evaluate) = &spec.evaluate else { return Ok(()) };
    let share = Share { rank: rank.rank as usize, world: rank.world as usize };
    for (of, mut args) in subjects(spec, evaluate)? {
        args.device = Some(device);
        let subject = Subject::load(&args)?;
        for (name, exam) in evaluate.exams(spec.dataset_dir()) {
            let dir = spec.evaluations_dir().join(of).join(&name);
            tracing::info!("{of} model: {name}");
            let evaluation = one(spec, evaluate, &exam, &subject, &dir, share, world)?;
            if let Some(evaluation) = evaluation {
                log::write_json(&dir.join(EVALUATION_FILE), &evaluation)?;
                tracing::info!("{of} model: {name}\n{}", report::table(&evaluation));
                let model = if of == TUNED { "the model" } else { "before training" };
                tell(format!("{model}, {name}: {}", report::line(&evaluation)));
            }
        }
    }
    // The others' peer is not gone before they are.
    Ok(world.barrier()?)
}

/// The models that are asked, with the names of their directories.
fn subjects(spec: &JobSpec, evaluate: &EvaluateSpec) -> Result<Vec<(&'static str, SubjectArgs)>, Error> {
    let quantize = Some(evaluate.quantization).filter(|of| of.kind != QuantKind::None);
    let held = |model: &Path, adapter: Option<PathBuf>| {
        let plain: SubjectArgs = defaults(&[("--model", model)])?;
        // What is exported has the same one beside it.
        Ok::<_, Error>(SubjectArgs { tokenizer: Some(spec.tokenizer_dir()), adapter, quantize, ..plain })
    };
    let model = spec.model_dir();
    let is_beside = spec.adapter.is_some() && spec.export.merge == MergeBase::None;
    let tuned = match spec.train.steps {
        0 => held(&model, evaluate.adapter.clone())?,
        _ if is_beside => held(&model, Some(spec.adapter_dir()))?,
        _ => held(&spec.export_dir(), None)?,
    };
    let mut subjects = vec![(TUNED, tuned)];
    if evaluate.base {
        subjects.push((BASE, held(&model, None)?));
    }
    Ok(subjects)
}

/// One evaluation of one model; whole on the first rank, `None` on the others.
fn one(
    spec: &JobSpec,
    evaluate: &EvaluateSpec,
    exam: &Exam,
    subject: &Subject,
    dir: &Path,
    share: Share,
    world: &dyn Communicator,
) -> Result<Option<Evaluation>, Error> {
    let parts: Vec<PathBuf> = (0..share.world).map(|rank| dir.join(format!("rank-{rank}"))).collect();
    let parts: Vec<&Path> = parts.iter().map(PathBuf::as_path).collect();
    let own = parts.get(share.rank).copied().unwrap_or(dir);
    let is_first = share.rank == 0;
    if let Exam::Files(dataset, is_own) = exam {
        let plain: repository::RepoArgs =
            defaults(&[("--model", dir), ("--out", dir), ("--dataset", dataset)])?;
        let trained_on = if *is_own { Vec::new() } else { vec![spec.dataset_dir()] };
        let (files, holes) = (evaluate.files as usize, evaluate.holes as usize);
        let window_tokens = Some(evaluate.window_tokens);
        let questions = Questions { trained_on, files, holes, window_tokens, ..plain.questions };
        let exam = repository::Exam::open(&questions)?;
        exam.answer(&questions, subject, own, share)?;
        world.barrier()?;
        return is_first.then(|| exam.gather(&questions, subject, &parts)).transpose();
    }
    let (work, protocol, drawing) = asked(evaluate, exam, dir)?;
    work.answer(own, share, subject, protocol, drawing)?;
    world.barrier()?;
    if !is_first {
        return Ok(None);
    }
    let found = work.gather(&parts)?;
    let settings = work.settings(protocol.settings(&drawing));
    Ok(Some(report::evaluation(work.kind, subject.described.clone(), settings, work.digest, found)))
}

/// Tasks that are judged by tests, as the verbs ask them.
fn asked(evaluate: &EvaluateSpec, exam: &Exam, dir: &Path) -> Result<(Work, Protocol, Drawing), Error> {
    let (Exam::Humaneval(tasks) | Exam::Infilling(tasks) | Exam::Files(tasks, _)) = exam;
    let flags: [(&str, &Path); 3] = [("--model", dir), ("--out", dir), ("--tasks", tasks)];
    let judge = |judge: JudgeArgs| JudgeArgs {
        python: evaluate.python.clone(),
        allow_unisolated: evaluate.allow_unisolated,
        ..judge
    };
    if matches!(exam, Exam::Infilling(_)) {
        let args: InfillingArgs = defaults(&flags)?;
        let work = Work::open(&judge(args.judge.clone()), Kind::Infilling, Some(true))?;
        let (protocol, drawing) = args.protocol(&work.tasks);
        return Ok((work, protocol, drawing));
    }
    let args: HumanevalArgs = defaults(&flags)?;
    let work = Work::open(&judge(args.judge.clone()), Kind::Humaneval, Some(false))?;
    let (protocol, drawing) = args.protocol();
    Ok((work, protocol, Drawing { samples_per_task: evaluate.samples_per_task, ..drawing }))
}
