//! Tests of NCCL itself, on a machine with a GPU:
//! `cargo test -p hyperlora-ranks --features cuda --lib nccl -- --ignored`.

use std::net::TcpListener;

use super::*;

/// Length of a bucket in numbers: 16 MiB.
const BUCKET: usize = 4 << 20;
/// Rounds after which a round needs no more memory.
const SETTLED: usize = 20;

/// Joins a world of one over NCCL, which only tests need.
fn world(device: &Device) -> Nccl {
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let placement = Placement {
        launcher: "a test",
        rank: 0,
        world_size: 1,
        local_rank: 0,
        one_machine: true,
        master: Some(("127.0.0.1".into(), free - 1)),
    };
    let timeout = Duration::from_mins(1);
    Nccl::start(&placement, device, &JoinConfig { timeout, start_timeout: timeout }).unwrap()
}

fn place_of(bucket: &Tensor<1>) -> usize {
    DeviceMemory::of(bucket.clone()).unwrap().pointer.addr()
}

#[test]
#[ignore = "needs a GPU and NCCL"]
fn a_thousand_buckets_come_back_unchanged_in_their_place_and_no_memory_is_lost() {
    let device = Device::cuda(0);
    let world = world(&device);
    let numbers: Vec<f32> = (0..BUCKET).map(|index| index as f32).collect();
    let mut bucket =
        Tensor::<1>::zeros([BUCKET], &device).slice_assign(0..BUCKET, Tensor::from_floats(&numbers[..], &device));
    let place = place_of(&bucket);
    let mut free = 0;
    for round in 0..1000 {
        let first = Tensor::from_floats([round as f32], &device);
        bucket = bucket.slice_assign(0..1, first);
        bucket = world.all_reduce_mean("a test", bucket).unwrap()().unwrap();
        bucket = world.reduce_scatter_mean("a test", bucket).unwrap()().unwrap();
        assert_eq!(place_of(&bucket), place, "round {round}");
        if round == SETTLED {
            (free, _) = cudarc::driver::result::mem_get_info().unwrap();
        }
    }
    let (left, _) = cudarc::driver::result::mem_get_info().unwrap();
    let gathered = world.all_gather("a test", bucket.clone()).unwrap()().unwrap();
    for found in [bucket, gathered] {
        let found: Vec<f32> = found.into_data().iter().collect();
        assert!(found[0] == 999.0 && found[1..] == numbers[1..]);
    }
    assert!(left >= free, "{} bytes are gone", free - left);
    world.leave();
}

#[test]
#[ignore = "needs a GPU and NCCL"]
fn bf16_travels_as_it_is() {
    let device = Device::cuda(0);
    let world = world(&device);
    let bucket = Tensor::<1>::ones([BUCKET], (&device, DType::BF16));
    let reduced = world.all_reduce_mean("a test", bucket).unwrap()().unwrap();
    assert_eq!(reduced.dtype(), DType::BF16);
    assert!(reduced.into_data().iter::<f32>().all(|number| number == 1.0));
    world.leave();
}
