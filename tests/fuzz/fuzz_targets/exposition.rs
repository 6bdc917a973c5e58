//! What applications expose about their pools, in the text formats of Prometheus and OpenMetrics.

#![no_main]

use std::{collections::BTreeSet, sync::LazyLock};

use coalmine_agent::pool::{CustomMetric, read};
use libfuzzer_sys::fuzz_target;

/// Most pools, numbers, and bytes of a pool's name.
const MOST_POOLS: usize = 64;
const MOST_NUMBERS: usize = 4_096;
const MOST_NAME_BYTES: usize = 128;

static CUSTOM: LazyLock<Vec<CustomMetric>> = LazyLock::new(|| {
    let custom = [
        "used=app_pool{state=busy}",
        "max=app_pool_max",
        "waits=app_pool_waits_total",
        "wait_seconds=app_pool_wait_seconds_total",
        "acquire_bucket=app_pool_acquire_seconds",
    ];
    custom.map(|text| text.parse::<CustomMetric>().unwrap()).into()
});

fuzz_target!(|data: &[u8]| {
    let readings = read(data, &CUSTOM);
    assert_eq!(read(data, &CUSTOM), readings);
    assert!(readings.len() <= MOST_NUMBERS);
    let pools: BTreeSet<&str> = readings.iter().map(|reading| reading.pool.as_str()).collect();
    assert!(pools.len() <= MOST_POOLS);
    assert!(pools.iter().all(|name| name.len() <= MOST_NAME_BYTES));
    // A comment says nothing.
    let commented = [b"# nothing\n", data].concat();
    assert_eq!(read(&commented, &CUSTOM), readings);
});
