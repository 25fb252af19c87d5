//! The record of a communicator whose operations end when the test says so.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use super::*;

const GATHER: Tag = Tag { unit: Some(1), what: "gather" };

/// Its gathers end when it is told to, and not when they are waited for: as on a GPU. Its sums are done
/// while they are waited for, when nobody holds the lock.
#[derive(Default)]
pub(in crate::comm) struct Device {
    gathered: Arc<Flag>,
    held: Arc<Mutex<()>>,
}

#[derive(Default)]
struct Flag(AtomicBool);

impl Completion for Flag {
    fn is_complete(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

struct Enqueued(Arc<Flag>);

impl Work for Enqueued {
    fn wait(self: Box<Self>) -> Result<(), Error> {
        Ok(())
    }
    fn completion(&self) -> Option<Arc<dyn Completion>> {
        Some(self.0.clone())
    }
}

struct Held(Arc<Mutex<()>>);

impl Work for Held {
    fn wait(self: Box<Self>) -> Result<(), Error> {
        drop(self.0.lock().unwrap());
        Ok(())
    }
}

impl Communicator for Device {
    fn rank(&self) -> Rank {
        Rank::SOLE
    }
    fn all_gather(&self, _buffer: &Tensor, _tag: Tag) -> Result<Box<dyn Work>, Error> {
        Ok(Box::new(Enqueued(self.gathered.clone())))
    }
    fn reduce_scatter(&self, _: &Tensor, _: &Tensor, _: Tag) -> Result<Box<dyn Work>, Error> {
        Err(Error::Backend("refused".to_owned()))
    }
    fn all_reduce(&self, _tensor: &Tensor, _tag: Tag) -> Result<Box<dyn Work>, Error> {
        Ok(Box::new(Held(self.held.clone())))
    }
    fn barrier(&self) -> Result<(), Error> {
        Ok(())
    }
    fn abort(&self, _reason: &str) {}
}

fn recorded() -> (Recorded<Device>, Arc<Record>, Arc<Flag>) {
    let record = Arc::new(Record::new(vec!["embed".to_owned(), "block.0".to_owned()]));
    let device = Device::default();
    let flag = device.gathered.clone();
    (Recorded::new(device, record.clone()), record, flag)
}

pub(in crate::comm) fn tensor() -> Tensor {
    Tensor::zeros([6], (tch::Kind::Float, tch::Device::Cpu))
}

fn sequence(collective: Option<Collective>) -> Option<u64> {
    collective.map(|collective| collective.sequence)
}

#[test]
fn operations_are_remembered_in_the_order_of_their_start() {
    let (comm, record, _) = recorded();
    assert!(record.snapshot().last_started.is_none());
    let count = Tag { unit: None, what: "target count" };
    comm.all_reduce(&tensor(), count).unwrap().wait().unwrap();
    let _pending = comm.all_gather(&tensor(), GATHER).unwrap();
    comm.barrier().unwrap();
    let snapshot = record.snapshot();
    let told: Vec<_> = snapshot
        .collectives
        .iter()
        .map(|c| (c.sequence, c.operation, c.bytes, record.about(c.tag)))
        .collect();
    assert_eq!(
        told,
        [
            (1, Operation::AllReduce, 24, "target count".to_owned()),
            (2, Operation::AllGather, 24, "gather of block.0".to_owned()),
            (3, Operation::Barrier, 0, "barrier".to_owned()),
        ]
    );
    assert_eq!(sequence(snapshot.last_started), Some(3));
    assert_eq!(sequence(snapshot.last_finished), Some(3));
    assert_eq!(sequence(snapshot.oldest_unfinished), Some(2));
}

#[test]
fn an_operation_ends_when_the_device_is_through_and_not_when_the_host_goes_on() {
    let (comm, record, flag) = recorded();
    comm.all_gather(&tensor(), GATHER).unwrap().wait().unwrap();
    assert_eq!(sequence(record.oldest_unfinished()), Some(1));
    flag.0.store(true, Ordering::Release);
    assert_eq!(record.oldest_unfinished(), None);
    let snapshot = record.snapshot();
    assert!(matches!(snapshot.collectives[0].state, State::Finished(_)), "{snapshot:?}");
    assert_eq!(sequence(snapshot.last_finished), Some(1));
}

#[test]
fn an_operation_that_goes_on_only_when_it_is_waited_for_is_unfinished_only_then() {
    let record = Arc::new(Record::new(Vec::new()));
    let device = Device::default();
    let held = device.held.clone();
    let comm = Recorded::new(device, record.clone());
    let sum = comm.all_reduce(&tensor(), GATHER).unwrap();
    assert_eq!(record.snapshot().collectives[0].state, State::Idle);
    assert_eq!(record.oldest_unfinished(), None);
    let guard = held.lock().unwrap();
    thread::scope(|scope| {
        scope.spawn(|| sum.wait().unwrap());
        while record.oldest_unfinished().is_none() {
            thread::yield_now();
        }
        drop(guard);
    });
    assert_eq!(sequence(record.snapshot().last_finished), Some(1));
}

#[test]
fn a_refused_operation_has_failed_and_nobody_waits_for_it() {
    let (comm, record, _) = recorded();
    assert!(comm.reduce_scatter(&tensor(), &tensor(), GATHER).is_err());
    let snapshot = record.snapshot();
    assert!(matches!(snapshot.collectives[0].state, State::Failed(_)), "{snapshot:?}");
    assert_eq!((snapshot.oldest_unfinished, snapshot.last_finished), (None, None));
}

#[test]
fn a_full_record_forgets_the_oldest_and_goes_on_counting() {
    let (comm, record, _) = recorded();
    let total = CAPACITY as u64 + 10;
    let mut under_way: Vec<Box<dyn Work>> = Vec::new();
    for _ in 0..total {
        under_way.push(comm.all_gather(&tensor(), GATHER).unwrap());
    }
    let snapshot = record.snapshot();
    assert_eq!(snapshot.collectives.len(), CAPACITY);
    let sequences: Vec<u64> = snapshot.collectives.iter().map(|c| c.sequence).collect();
    assert_eq!(sequences, (11..=total).collect::<Vec<_>>());
    assert_eq!(sequence(snapshot.oldest_unfinished), Some(11));
    // The end of one that is forgotten changes nothing of the one in its place.
    record.end(1, true);
    assert_eq!(record.snapshot().collectives[CAPACITY - 10].state, State::Started);
    assert_eq!(record.snapshot().last_finished, None);
}

#[test]
fn a_record_that_lets_go_of_its_work_holds_none_of_it() {
    let (comm, record, flag) = recorded();
    drop(comm.all_gather(&tensor(), GATHER).unwrap());
    drop(comm);
    assert_eq!(Arc::strong_count(&flag), 2, "the record looks at it");
    record.forget_work();
    assert_eq!(Arc::strong_count(&flag), 1);
}
