//! Row group cache: keeps the most recently used groups, each read by one thread at a time.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use data_prep::shard::FaceRecord;
use hyperlora_core::Result;

/// Faces of a row group.
pub(super) type Records = Arc<Vec<FaceRecord>>;

/// Row group cache with a limit in bytes. The most recent group always stays.
pub(super) struct Cache {
    kept: Mutex<Kept>,
    /// Row groups that a thread is reading.
    reading: Mutex<HashMap<u32, Arc<Mutex<()>>>>,
}

impl Cache {
    pub(super) fn new(limit: usize) -> Self {
        Self { kept: Mutex::new(Kept { limit, ..Kept::default() }), reading: Mutex::default() }
    }

    /// Returns the row group from memory or from `read`. Threads that want the same group wait for one read.
    pub(super) fn get_or_read(
        &self,
        group: u32,
        read: impl FnOnce() -> Result<Option<Records>>,
    ) -> Result<Option<Records>> {
        if let Some(records) = lock(&self.kept).get(group) {
            return Ok(Some(records));
        }
        let turn = Arc::clone(lock(&self.reading).entry(group).or_default());
        let _mine = lock(&turn);
        if let Some(records) = lock(&self.kept).get(group) {
            return Ok(Some(records));
        }
        let outcome = read();
        if let Ok(Some(records)) = &outcome {
            lock(&self.kept).put(group, Arc::clone(records));
        }
        lock(&self.reading).remove(&group);
        outcome
    }
}

/// A panic in another thread cannot corrupt the cache, because it holds only groups that were read completely.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Default)]
struct Kept {
    limit: usize,
    bytes: usize,
    clock: u64,
    groups: HashMap<u32, Group>,
}

struct Group {
    records: Records,
    bytes: usize,
    used: u64,
}

impl Kept {
    fn get(&mut self, group: u32) -> Option<Records> {
        self.clock += 1;
        let clock = self.clock;
        self.groups.get_mut(&group).map(|kept| {
            kept.used = clock;
            Arc::clone(&kept.records)
        })
    }

    fn put(&mut self, group: u32, records: Records) {
        let bytes = records.iter().map(bytes_of).sum();
        if let Some(replaced) = self.groups.remove(&group) {
            self.bytes -= replaced.bytes;
        }
        while self.bytes + bytes > self.limit
            && let Some(oldest) = self.groups.iter().min_by_key(|(_, kept)| kept.used).map(|(group, _)| *group)
            && let Some(dropped) = self.groups.remove(&oldest)
        {
            self.bytes -= dropped.bytes;
        }
        self.bytes += bytes;
        self.groups.insert(group, Group { records, bytes, used: self.clock });
    }
}

/// Size of a record in bytes, including its heap data.
fn bytes_of(record: &FaceRecord) -> usize {
    let FaceRecord { key, image, landmarks, id_embedding, caption, sha256, identity, split, .. } = record;
    let texts = [Some(key), Some(caption), Some(sha256), identity.as_ref(), split.as_ref()];
    let texts: usize = texts.into_iter().flatten().map(String::len).sum();
    let numbers = size_of_val(landmarks.as_slice()) + size_of_val(id_embedding.as_slice());
    size_of::<FaceRecord>() + image.len() + texts + numbers
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    fn group(image: usize) -> Records {
        Arc::new(vec![FaceRecord {
            key: String::new(),
            image: vec![0; image],
            width: 1,
            height: 1,
            face_box: [0.0; 4],
            points: [[0.0; 2]; 5],
            landmarks: Vec::new(),
            score: 1.0,
            id_embedding: Vec::new(),
            caption: String::new(),
            sha256: String::new(),
            identity: None,
            split: None,
        }])
    }

    #[test]
    fn threads_that_want_the_same_group_read_it_once() {
        let (cache, reads) = (Cache::new(1 << 20), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let read = || {
                        reads.fetch_add(1, Ordering::Relaxed);
                        std::thread::yield_now();
                        Ok(Some(group(1000)))
                    };
                    assert!(cache.get_or_read(3, read).unwrap().is_some());
                });
            }
        });
        assert_eq!(reads.into_inner(), 1);
    }

    #[test]
    fn the_least_recently_used_groups_give_way_and_the_last_one_stays() {
        let read = |cache: &Cache, number| {
            let mut missed = false;
            let records = cache.get_or_read(number, || {
                missed = true;
                Ok(Some(group(1000)))
            });
            assert!(records.unwrap().is_some());
            missed
        };
        let two = Cache::new(2 * (1000 + size_of::<FaceRecord>()));
        assert_eq!([1, 2, 1, 3, 1, 2].map(|number| read(&two, number)), [true, true, false, true, false, true]);
        // All fields count, not only pictures.
        let caption = |number: u32, cache: &Cache| {
            let mut missed = false;
            let records = cache.get_or_read(number, || {
                missed = true;
                Ok(Some(Arc::new(vec![FaceRecord { caption: "x".repeat(2 << 20), ..group(0)[0].clone() }])))
            });
            assert!(records.unwrap().is_some());
            missed
        };
        let small = Cache::new(3 << 20);
        assert_eq!([1, 1, 2, 1].map(|number| caption(number, &small)), [true, false, true, true]);
        let none = Cache::new(0);
        assert_eq!([1, 1, 2, 1].map(|number| read(&none, number)), [true, false, true, true]);
    }
}
