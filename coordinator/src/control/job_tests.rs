//! The state machine under every order of events that a generator can think of.

use proptest::prelude::*;
use tunefleet_proto::rpc::{Collective, JobState, RankEnded};

use super::*;

const WORLD: u32 = 3;

fn worker(index: u32) -> WorkerName {
    WorkerName::from(format!("w{}", index % 2).as_str())
}

fn clean() -> Exit {
    Exit { code: Some(0), ..Exit::default() }
}

fn killed() -> Exit {
    Exit { signal: Some(9), ..Exit::default() }
}

/// A job at the moment when all its training ranks run.
fn training() -> Job {
    let mut job = Job::new(WORLD, 100);
    job.apply(Input::Begin).unwrap();
    for stage in [Stage::Collect, Stage::Tokenizer, Stage::InitModel] {
        job.apply(Input::Inspected(stage, Ok(Verdict::Cached))).unwrap();
    }
    job.apply(Input::Inspected(Stage::Train, Ok(Verdict::Run { resume: false }))).unwrap();
    job.apply(Input::Placed(Stage::Train, (0..WORLD).map(worker).collect(), vec![7])).unwrap();
    for rank in 0..WORLD {
        job.apply(Input::Ready { stage: Stage::Train, rank, address: format!("a{rank}") }).unwrap();
    }
    job
}

fn end_rank(job: &mut Job, rank: u32, outcome: Option<Outcome>, exit: Exit) -> Vec<Effect> {
    let stage = Stage::Train;
    if let Some(outcome) = outcome {
        job.apply(Input::Done { stage, rank, outcome }).unwrap();
    }
    job.apply(Input::Exited { stage, rank, exit }).unwrap()
}

#[test]
fn a_job_whose_stages_are_all_cached_completes_without_a_slot() {
    let mut job = Job::new(WORLD, 100);
    let mut effects = job.apply(Input::Begin).unwrap();
    for stage in Stage::ALL {
        assert!(effects.contains(&Effect::Inspect(stage)), "{effects:?}");
        effects = job.apply(Input::Inspected(stage, Ok(Verdict::Cached))).unwrap();
    }
    assert_eq!(job.end(), Some(&End::Completed));
}

#[test]
fn ranks_start_together_when_the_last_one_is_ready() {
    let mut job = Job::new(WORLD, 100);
    job.phase = Phase::Waiting { stage: Stage::Train, resume: true };
    let effects = job.apply(Input::Placed(Stage::Train, (0..WORLD).map(worker).collect(), vec![7])).unwrap();
    let started: Vec<_> = effects
        .iter()
        .map(|effect| match effect {
            Effect::StartOn { worker, ranks, resume: true, .. } => (worker.to_string(), ranks.clone()),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(started, [("w0".to_owned(), vec![0, 2]), ("w1".to_owned(), vec![1])]);
    for rank in [2, 0] {
        let ready = Input::Ready { stage: Stage::Train, rank, address: format!("a{rank}") };
        assert_eq!(job.apply(ready).unwrap(), []);
    }
    let ready = Input::Ready { stage: Stage::Train, rank: 1, address: "a1".to_owned() };
    let effects = job.apply(ready).unwrap();
    let [Effect::StartRanks { peers, .. }] = &effects[..] else { panic!("{effects:?}") };
    assert_eq!(peers, &["a0", "a1", "a2"]);
}

#[test]
fn the_first_failed_rank_stops_the_others_and_is_named_once_all_are_gone() {
    let mut job = training();
    let noticed = Outcome::Failed { message: "rank 1 is gone".to_owned(), consequence: true, kind: 0 };
    let effects = end_rank(&mut job, 0, Some(noticed), Exit { code: Some(1), ..Exit::default() });
    assert!(effects.iter().any(|e| matches!(e, Effect::Abort { stage: Stage::Train, .. })), "{effects:?}");
    assert_eq!(job.state(), JobState::Stopping);
    end_rank(&mut job, 1, None, killed());
    let effects = end_rank(&mut job, 2, None, Exit { aborted: true, ..killed() });
    assert!(effects.contains(&Effect::Release));
    let Some(End::Failed(failure)) = job.end() else { panic!("{:?}", job.end()) };
    assert_eq!((failure.rank, failure.exit.as_str()), (Some(1), "signal 9 (SIGKILL)"));
}

#[test]
fn a_stop_saves_first_and_the_grace_period_ends_it() {
    let mut job = training();
    let effects = job.apply(Input::Stop { checkpoint: true }).unwrap();
    assert!(effects.iter().any(|e| matches!(e, Effect::StopAtCheckpoint { .. })));
    let mut slow = job.clone();
    for rank in 0..WORLD {
        end_rank(&mut job, rank, Some(Outcome::Stopped(42)), clean());
    }
    assert_eq!(job.end(), Some(&End::Stopped(42)));

    let effects = slow.apply(Input::GraceOver).unwrap();
    assert!(effects.iter().any(|e| matches!(e, Effect::Abort { .. })));
    for rank in 0..WORLD {
        end_rank(&mut slow, rank, None, Exit { aborted: true, ..killed() });
    }
    assert_eq!(slow.end(), Some(&End::Cancelled));
}

#[test]
fn training_that_was_asked_to_stop_but_had_finished_does_not_export() {
    let mut job = training();
    job.apply(Input::Stop { checkpoint: true }).unwrap();
    for rank in 0..WORLD {
        end_rank(&mut job, rank, Some(Outcome::Finished), clean());
    }
    job.apply(Input::Recorded(Stage::Train, Ok(()))).unwrap();
    assert_eq!(job.end(), Some(&End::Stopped(100)));
}

#[test]
fn a_lost_worker_fails_the_ranks_that_ran_there() {
    let mut job = training();
    let effects = job.apply(Input::WorkerLost(worker(1))).unwrap();
    let workers = BTreeSet::from([worker(0)]);
    assert!(
        effects.iter().any(|e| matches!(e, Effect::Abort { workers: told, .. } if *told == workers)),
        "{effects:?}"
    );
    assert!(job.apply(Input::Exited { stage: Stage::Train, rank: 1, exit: killed() }).is_err(), "stale");
    for rank in [0, 2] {
        end_rank(&mut job, rank, None, Exit { aborted: true, ..killed() });
    }
    let Some(End::Failed(failure)) = job.end() else { panic!("{:?}", job.end()) };
    assert!(failure.cause.contains("w1"), "{}", failure.cause);
}

/// Where a rank is that has started `sequence` operations, and waits in the last.
fn at(sequence: u64) -> Collectives {
    let about = "reduce of block.7".to_owned();
    let last = Some(Collective { sequence, about, seconds: 2.0, ..Collective::default() });
    Collectives { last_started: last.clone(), oldest_unfinished: last, ..Collectives::default() }
}

fn stalled(job: &mut Job, rank: u32, sequence: u64) -> Vec<Effect> {
    job.apply(Input::Stalled { stage: Stage::Train, rank, at: at(sequence) }).unwrap()
}

fn answered(job: &mut Job, rank: u32, sequence: u64) -> Vec<Effect> {
    job.apply(Input::Answered { stage: Stage::Train, rank, at: at(sequence) }).unwrap()
}

fn aborts(effects: &[Effect]) -> bool {
    effects.iter().any(|effect| matches!(effect, Effect::Abort { .. }))
}

fn ended(effects: &[Effect]) -> Vec<RankEnded> {
    let told = effects.iter().filter_map(|effect| match effect {
        Effect::Tell(Body::RankEnded(ended)) => Some(ended.clone()),
        _ => None,
    });
    told.collect()
}

#[test]
fn the_rank_behind_is_the_cause_and_the_others_were_aborted_by_peer() {
    let mut job = training();
    let effects = stalled(&mut job, 0, 9);
    let asked = effects
        .iter()
        .filter(|e| matches!(e, Effect::ReportCollectives { workers, .. } if workers.len() == 2));
    assert_eq!(asked.count(), 1, "{effects:?}");
    assert!(!aborts(&effects), "nobody is blamed before all were asked");
    assert_eq!(stalled(&mut job, 2, 9), [], "they are asked once");
    assert_eq!(job.state(), JobState::Running);
    let effects = answered(&mut job, 1, 8);
    assert!(
        effects.iter().any(|e| matches!(e, Effect::Abort { by_peer: true, reason, .. }
        if reason.starts_with("rank 1 is behind: it is at reduce of block.7 (#8)"))),
        "{effects:?}"
    );
    assert_eq!(job.state(), JobState::Stopping);

    let log = Exit { aborted: true, log_path: "rank-1.log".to_owned(), ..killed() };
    let told: Vec<RankEnded> = [(0, killed()), (1, log), (2, killed())]
        .into_iter()
        .flat_map(|(rank, exit)| ended(&end_rank(&mut job, rank, None, Exit { aborted: true, ..exit })))
        .collect();
    assert_eq!(told.iter().map(|ended| ended.aborted_by_peer).collect::<Vec<_>>(), [true, false, true]);
    assert!(told[0].how.starts_with("aborted by peer: rank 1 is behind"), "{}", told[0].how);
    let Some(End::Failed(failure)) = job.end() else { panic!("{:?}", job.end()) };
    assert_eq!(
        (failure.rank, failure.worker.as_str(), failure.log_path.as_str()),
        (Some(1), "w1", "rank-1.log")
    );
    assert_eq!(failure.aborted_ranks, [0, 2]);
    assert!(failure.exit.is_empty(), "how it was ended explains nothing");
}

#[test]
fn a_rank_that_does_not_answer_in_time_is_behind() {
    let mut job = training();
    let entered = Input::Entered { stage: Stage::Train, rank: 1, section: "save".to_owned() };
    job.apply(entered).unwrap();
    stalled(&mut job, 0, 9);
    answered(&mut job, 2, 9);
    let over = Input::AnswersOver(Stage::Train);
    assert!(aborts(&job.apply(over.clone()).unwrap()));
    assert!(job.apply(over).is_err(), "it is over once");
    for rank in 0..WORLD {
        end_rank(&mut job, rank, None, Exit { aborted: true, ..killed() });
    }
    let Some(End::Failed(failure)) = job.end() else { panic!("{:?}", job.end()) };
    assert_eq!(failure.rank, Some(1));
    assert!(failure.cause.contains("did not answer"), "{}", failure.cause);
    assert!(failure.cause.contains("section \"save\""), "{}", failure.cause);
}

#[test]
fn a_rank_that_dies_while_others_are_asked_is_the_cause() {
    let mut job = training();
    stalled(&mut job, 0, 9);
    assert!(aborts(&end_rank(&mut job, 1, None, killed())));
    assert!(job.apply(Input::AnswersOver(Stage::Train)).is_err(), "nobody waits for answers");
    for rank in [0, 2] {
        end_rank(&mut job, rank, None, Exit { aborted: true, ..killed() });
    }
    let Some(End::Failed(failure)) = job.end() else { panic!("{:?}", job.end()) };
    assert_eq!((failure.rank, failure.exit.as_str()), (Some(1), "signal 9 (SIGKILL)"));
    assert_eq!(failure.aborted_ranks, [0, 2]);
}

#[test]
fn a_stall_that_ended_after_all_fails_nothing() {
    let mut job = training();
    stalled(&mut job, 0, 9);
    for rank in 0..WORLD {
        end_rank(&mut job, rank, Some(Outcome::Finished), clean());
    }
    assert_eq!(job.stage(), Stage::Train);
    job.apply(Input::Recorded(Stage::Train, Ok(()))).unwrap();
    assert_eq!(job.state(), JobState::Running);
}

#[test]
fn ranks_of_a_cancelled_job_were_not_aborted_by_peers() {
    let mut job = training();
    let effects = job.apply(Input::Stop { checkpoint: false }).unwrap();
    assert!(effects.iter().any(|e| matches!(e, Effect::Abort { by_peer: false, .. })), "{effects:?}");
    for rank in 0..WORLD {
        let effects = end_rank(&mut job, rank, None, Exit { aborted: true, ..killed() });
        assert_eq!(ended(&effects), []);
    }
    assert_eq!(job.end(), Some(&End::Cancelled));
}

/// What the world outside may answer to an effect.
fn answers(effect: &Effect, pick: u8, stopping: bool) -> Vec<Input> {
    match effect {
        Effect::Inspect(stage) => {
            let verdict = match pick % 8 {
                0 => Ok(Verdict::Absent),
                1 => Ok(Verdict::Cached),
                2 => Err("cannot look".to_owned()),
                other => Ok(Verdict::Run { resume: other % 2 == 0 }),
            };
            vec![Input::Inspected(*stage, verdict)]
        }
        Effect::Collect => {
            vec![Input::Collected(if pick.is_multiple_of(8) { Err("no".to_owned()) } else { Ok(()) })]
        }
        Effect::Record(stage) => vec![Input::Recorded(*stage, Ok(()))],
        Effect::Place(stage) => {
            let world = if *stage == Stage::Train { WORLD } else { 1 };
            vec![Input::Placed(*stage, (0..world).map(worker).collect(), vec![7])]
        }
        Effect::StartOn { stage, ranks, .. } => ranks
            .iter()
            .flat_map(|&rank| {
                let stage = *stage;
                let outcome = if stopping { Outcome::Stopped(1) } else { Outcome::Finished };
                let exit = if pick.is_multiple_of(8) { killed() } else { clean() };
                [
                    Input::Ready { stage, rank, address: String::new() },
                    Input::Done { stage, rank, outcome },
                    Input::Exited { stage, rank, exit },
                ]
            })
            .collect(),
        Effect::ReportCollectives { stage, .. } => {
            let answer =
                |rank| Input::Answered { stage: *stage, rank, at: at(u64::from(pick % 4) + u64::from(rank)) };
            (0..WORLD - 1).map(answer).chain([Input::AnswersOver(*stage)]).collect()
        }
        _ => Vec::new(),
    }
}

/// An input out of nowhere: of another stage, a rank that is not there, a repeat.
fn noise(pick: u8) -> Input {
    let stage = Stage::ALL[usize::from(pick) % Stage::ALL.len()];
    let rank = u32::from(pick) % (WORLD + 1);
    match pick % 16 {
        0 => Input::Begin,
        1 => Input::Inspected(stage, Ok(Verdict::Cached)),
        2 => Input::Collected(Ok(())),
        3 => Input::Placed(stage, (0..rank).map(worker).collect(), vec![7]),
        4 => Input::Ready { stage, rank, address: String::new() },
        5 => Input::Done { stage, rank, outcome: Outcome::Finished },
        6 => Input::Exited { stage, rank, exit: killed() },
        7 => Input::WorkerLost(worker(rank)),
        8 => Input::Recorded(stage, Ok(())),
        9 => Input::Stop { checkpoint: pick.is_multiple_of(2) },
        10 => Input::Entered { stage, rank, section: "step".to_owned() },
        11 => Input::Stalled { stage, rank, at: at(u64::from(pick)) },
        12 => Input::Answered { stage, rank, at: at(u64::from(pick)) },
        13 => Input::AnswersOver(stage),
        14 => Input::Overdue { stage, rank, words: "it is slow".to_owned() },
        _ => Input::GraceOver,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn no_order_of_events_breaks_a_job(steps in prop::collection::vec((any::<u8>(), any::<u8>()), 1..80)) {
        let mut job = Job::new(WORLD, 100);
        let mut pending = vec![Input::Begin];
        let mut live: Option<Stage> = None;
        for (choice, pick) in steps {
            // Mostly what the world would answer, in an order of its own; now and then noise.
            let input = if choice >= 40 && !pending.is_empty() {
                let order = if choice % 4 == 0 { usize::from(pick) % pending.len() } else { 0 };
                pending.remove(order)
            } else {
                noise(pick)
            };
            let before = job.clone();
            let effects = match job.apply(input) {
                Ok(effects) => effects,
                Err(_) => {
                    prop_assert_eq!(&job, &before, "a stale input changes nothing");
                    continue;
                }
            };
            prop_assert!(before.end().is_none(), "an end absorbs: {:?}", before);
            let json = serde_json::to_string(&job).unwrap();
            let kept: Job = serde_json::from_str(&json).unwrap();
            prop_assert_eq!(serde_json::to_string(&kept).unwrap(), json, "what is kept is all there is");
            let ranks: Vec<u32> = effects
                .iter()
                .flat_map(|effect| match effect {
                    Effect::StartOn { ranks, .. } => ranks.clone(),
                    _ => Vec::new(),
                })
                .collect();
            if !ranks.is_empty() {
                let mut sorted = ranks.clone();
                sorted.sort_unstable();
                let stage = job.stage();
                prop_assert_eq!(live, None, "one task at a time");
                prop_assert_eq!(sorted, (0..job.world(stage)).collect::<Vec<_>>(), "all ranks, each once, or none");
                live = Some(stage);
            }
            // What a worker is told again after a broken session changes nothing that is true.
            for name in job.task().map(Task::workers).unwrap_or_default() {
                let held = job.task().unwrap().ranks_on(&name).into_iter().collect();
                for effect in kept.again(&name, &held) {
                    prop_assert!(!matches!(effect, Effect::StartOn { .. }), "{effect:?}");
                }
            }
            for effect in &effects {
                match effect {
                    Effect::StartOn { stage, .. } => prop_assert_eq!(live, Some(*stage)),
                    Effect::StartRanks { stage, peers, .. } => {
                        prop_assert_eq!(live, Some(*stage));
                        prop_assert_eq!(peers.len() as u32, job.world(*stage), "none starts alone");
                    }
                    Effect::StopAtCheckpoint { stage, .. }
                    | Effect::Abort { stage, .. }
                    | Effect::ReportCollectives { stage, .. } => {
                        prop_assert_eq!(live, Some(*stage));
                    }
                    Effect::Release => prop_assert!(live.take().is_some()),
                    _ => {}
                }
                pending.extend(answers(effect, pick, job.state() == JobState::Stopping));
            }
            if job.end().is_some() {
                prop_assert_eq!(live, None, "no rank outlives its job");
            }
        }
    }
}
