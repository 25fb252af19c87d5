//! Memory of CPU tensors is counted, whoever frees it. One test: the count is the whole process's.

use tch::{Device, Kind, Tensor};
use tunefleet_kernels::device::{CpuMemory, count_cpu_memory, cpu_memory, keep_freed_memory, reset_cpu_peak};

const FLOATS: (Kind, Device) = (Kind::Float, Device::Cpu);

#[test]
fn cpu_tensors_are_counted_from_their_making_to_their_end_on_any_thread() {
    let before = Tensor::zeros([1000], FLOATS);
    keep_freed_memory();
    assert_eq!(cpu_memory(), CpuMemory { allocated: 0, allocated_peak: 0 });
    count_cpu_memory().unwrap();
    count_cpu_memory().unwrap();
    // Not counted when it was made, so not when it goes.
    drop(before);
    assert_eq!(cpu_memory().allocated, 0);

    let a = Tensor::zeros([1 << 20], FLOATS);
    let view = a.narrow(0, 0, 10);
    assert_eq!(cpu_memory(), CpuMemory { allocated: 4 << 20, allocated_peak: 4 << 20 });
    assert_eq!(a.data_ptr() as usize % 64, 0, "libtorch's alignment is kept");
    drop(a);
    assert_eq!(cpu_memory().allocated, 4 << 20, "a view keeps the memory");
    drop(view);
    assert_eq!(cpu_memory(), CpuMemory { allocated: 0, allocated_peak: 4 << 20 });
    reset_cpu_peak();
    assert_eq!(cpu_memory(), CpuMemory { allocated: 0, allocated_peak: 0 });

    // A storage that grows takes the new memory before the old goes.
    let mut grown = Tensor::ones([100], FLOATS);
    let _ = grown.resize_([1000]);
    assert_eq!(cpu_memory(), CpuMemory { allocated: 4000, allocated_peak: 4400 });
    assert_eq!(grown.narrow(0, 0, 100).sum(Kind::Float).double_value(&[]), 100.0);
    grown.set_data(&Tensor::zeros([3], FLOATS));
    drop(grown);
    let empty = Tensor::zeros([0], FLOATS);
    assert_eq!((cpu_memory().allocated, empty.numel()), (0, 0));

    // Made here and freed there, and the other way round, many at once.
    let threads: Vec<_> = (1..=8)
        .map(|i| {
            let given = Tensor::zeros([i * 1000], FLOATS);
            std::thread::spawn(move || {
                let sum: f64 = (0..100).map(|_| (&given + 1.0).sum(Kind::Double).double_value(&[])).sum();
                assert_eq!(sum, (i * 100_000) as f64);
                Tensor::zeros([i], FLOATS)
            })
        })
        .collect();
    let returned: Vec<_> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
    assert_eq!(cpu_memory().allocated, 4 * 36);
    drop(returned);
    assert_eq!(cpu_memory().allocated, 0);
}
