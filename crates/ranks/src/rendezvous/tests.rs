//! Meetings, notes and failures of ranks that are threads of one process.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::sync::{Barrier, Mutex, mpsc};
use std::thread;

use proptest::collection::vec;
use proptest::prelude::*;

use super::super::handshake::{HELLO, WORD, hello, read_hello};
use super::super::token::Token;
use super::*;

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn given(token: &str) -> Token {
    Token::Given(token.into())
}

/// Makes the meeting of a rank on this machine that knows `token`.
fn meeting(rank: usize, world_size: usize, port: u16, token: &Token) -> Meeting<'_> {
    Meeting { rank, world_size, address: ("127.0.0.1", port), one_machine: true, token, host: "node" }
}

/// Lets `rank` meet the others as `node-{rank}`.
fn meet(rank: usize, world_size: usize, port: u16, token: &str, timeout: u64) -> Result<Rendezvous> {
    let (host, token) = (format!("node-{rank}"), given(token));
    let meeting = Meeting { host: &host, ..meeting(rank, world_size, port, &token) };
    Rendezvous::meet(&meeting, Duration::from_secs(20), Duration::from_millis(timeout))
}

/// Runs `rank` on `world_size` threads, one per rank.
fn world<T: Send>(world_size: usize, rank: impl Fn(usize, u16) -> T + Sync) -> Vec<T> {
    let port = free_port();
    thread::scope(|scope| {
        let rank = &rank;
        let threads: Vec<_> = (0..world_size).map(|number| scope.spawn(move || rank(number, port))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

#[test]
fn every_rank_gets_the_notes_of_all() {
    let notes = world(4, |rank, port| {
        let met = meet(rank, 4, port, "run 7", 20_000).unwrap();
        assert_eq!(met.hosts(), ["node-0", "node-1", "node-2", "node-3"]);
        assert_eq!(met.exchange("nothing", &[]).unwrap(), vec![Vec::<u8>::new(); 4]);
        met.exchange("the notes", &vec![rank as u8; 3 * rank]).unwrap()
    });
    for of_rank in notes {
        assert_eq!(of_rank, [vec![], vec![1; 3], vec![2; 6], vec![3; 9]]);
    }
}

#[test]
fn a_rank_that_is_late_or_gone_is_named_to_all() {
    for (pause, words) in [(3000, "did not come within 0 s"), (0, "is gone")] {
        let ends = world(3, |rank, port| {
            let met = meet(rank, 3, port, "", 500).unwrap();
            if rank == 2 {
                thread::sleep(Duration::from_millis(pause));
                return None;
            }
            Some(met.exchange("step 5", &[]).unwrap_err())
        });
        for error in ends.into_iter().flatten() {
            assert_eq!(error.exit_code(), 75);
            assert_eq!(error.to_string(), format!("waiting for step 5: rank 2 (node-2) {words}"));
        }
    }
}

/// Connects to rank 0 as soon as it listens.
fn call(port: u16) -> TcpStream {
    let until = Instant::now() + Duration::from_secs(20);
    loop {
        match TcpStream::connect(("127.0.0.1", port)) {
            Ok(stream) => break stream,
            Err(problem) => assert!(Instant::now() < until, "{problem}"),
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// Reads until the connection is closed.
fn all_of(mut stream: &TcpStream) -> Vec<u8> {
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut all = Vec::new();
    // A connection closed with unread data ends in an error.
    let _ = stream.read_to_end(&mut all);
    all
}

#[test]
fn strangers_are_turned_away_and_do_not_disturb() {
    // Rank 1 comes after the strangers: once all ranks have met, nobody listens any more.
    let (strangers, told) = mpsc::channel();
    let told = Mutex::new(told);
    let met = world(3, |rank, port| {
        if rank == 2 {
            // A rank of another run, one of another world, and a program that is not a rank.
            for (token, world_size) in [("other", 2), ("ours", 3)] {
                let token = given(token);
                let stranger = meeting(1, world_size, port, &token);
                let error = reach(&stranger, Instant::now() + Duration::from_secs(1)).unwrap_err();
                assert_eq!(error.exit_code(), 75);
                assert!(error.to_string().contains("does not take this rank's token"), "{error}");
            }
            let mut scanner = call(port);
            let asked = scanner.write_all(b"GET / HTTP/1.0\r\n\r\nis anybody there?                ").is_ok();
            assert!(all_of(&scanner).is_empty());
            strangers.send(()).unwrap();
            return asked;
        }
        if rank == 1 {
            told.lock().unwrap().recv_timeout(Duration::from_secs(20)).unwrap();
        }
        meet(rank, 2, port, "ours", 20_000).unwrap().exchange("a word", b"word").is_ok()
    });
    assert_eq!(met, [true; 3]);
}

#[test]
fn those_who_connect_and_stay_silent_hold_nobody_up() {
    let port = free_port();
    thread::scope(|scope| {
        let first = scope.spawn(|| meet(0, 3, port, "ours", 20_000).unwrap().hosts().len());
        // More than rank 0 keeps, some of them in the middle of a word; none ever says more.
        let silent: Vec<TcpStream> = (0..400)
            .map(|number| {
                let mut stream = call(port);
                // Already turned away, if the others came too fast.
                let _ = stream.write_all(&b"hlranks2"[..number % 8]);
                stream
            })
            .collect();
        let begun = Instant::now();
        let others: Vec<_> = (1..3).map(|rank| scope.spawn(move || meet(rank, 3, port, "ours", 20_000))).collect();
        for other in others {
            assert_eq!(other.join().unwrap().unwrap().hosts().len(), 3);
        }
        assert_eq!(first.join().unwrap(), 3);
        assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
        drop(silent);
    });
}

#[test]
fn the_deadline_of_the_meeting_is_one_however_many_connect() {
    let port = free_port();
    let deadline = Duration::from_millis(1500);
    let begun = Instant::now();
    thread::scope(|scope| {
        let first = scope.spawn(|| {
            let token = given("ours");
            Rendezvous::meet(&meeting(0, 4, port, &token), deadline, deadline).err().unwrap()
        });
        // Waiting for each in turn would exceed the deadline. A real rank comes near its end.
        let strangers: Vec<TcpStream> = (0..20).map(|_| call(port)).collect();
        thread::sleep(deadline / 2);
        let token = given("ours");
        reach(&meeting(2, 4, port, &token), Instant::now() + deadline).unwrap();
        let error = first.join().unwrap();
        assert_eq!(error.exit_code(), 75);
        assert_eq!(error.to_string(), "waiting for all ranks to meet: ranks [1, 3] did not come");
        drop(strangers);
    });
    assert!(begun.elapsed() < 3 * deadline, "{:?}", begun.elapsed());
    // The same holds for the other ranks.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = silent.local_addr().unwrap().port();
    let begun = Instant::now();
    assert!(reach(&meeting(1, 2, port, &given("ours")), begun + deadline).is_err());
    assert!(begun.elapsed() < 3 * deadline, "{:?}", begun.elapsed());
}

#[test]
fn a_fake_rank_0_is_refused_and_learns_nothing_that_the_true_one_takes() {
    let fake = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = fake.local_addr().unwrap().port();
    let soon = || Instant::now() + Duration::from_millis(500);
    // The fake gives its own nonce, and returns the rank's proof, which is all that it knows.
    let heard = thread::scope(|scope| {
        let listens = scope.spawn(|| {
            let mut heard = ([0; HELLO], [0; WORD]);
            for stream in fake.incoming() {
                let mut stream = stream.unwrap();
                let (mut hello, mut proof) = ([0; HELLO], [0; WORD]);
                if stream.read_exact(&mut hello).is_err() {
                    break;
                }
                stream.write_all(&[7; WORD]).unwrap();
                stream.read_exact(&mut proof).unwrap();
                stream.write_all(&proof).unwrap();
                heard = (hello, proof);
            }
            heard
        });
        let token = given("ours");
        let error = reach(&meeting(1, 2, port, &token), soon()).unwrap_err();
        assert!(error.to_string().contains("does not know the token of this run"), "{error}");
        // The rank retries until the fake gets a silent connection and ends.
        drop(call(port));
        listens.join().unwrap()
    });
    drop(fake);

    // Replay to the real rank 0, word for word; then reflect its own nonce.
    let port = free_port();
    thread::scope(|scope| {
        let first = scope.spawn(move || {
            let token = given("ours");
            Rendezvous::meet(&meeting(0, 2, port, &token), Duration::from_secs(2), Duration::from_secs(2)).err()
        });
        let (hello, proof) = heard;
        let mut replayed = call(port);
        replayed.write_all(&[&hello[..], &proof].concat()).unwrap();
        // Rank 0 answers with the nonce that everybody gets, and nothing more.
        assert_eq!(all_of(&replayed).len(), WORD);
        let mut reflected = call(port);
        reflected.write_all(&hello).unwrap();
        let mut firsts = [0; WORD];
        reflected.read_exact(&mut firsts).unwrap();
        reflected.write_all(&firsts).unwrap();
        assert!(all_of(&reflected).is_empty());
        let error = first.join().unwrap().unwrap();
        assert!(error.to_string().contains("ranks [1] did not come"), "{error}");
    });
}

#[test]
fn ranks_on_one_machine_make_a_token_and_meet_on_loopback_alone() {
    // Every rank gets a host name that leads elsewhere.
    let hosts = world(3, |rank, port| {
        let token = Token::HandedOver("a run".into());
        let meeting = Meeting { address: ("host.invalid", port), ..meeting(rank, 3, port, &token) };
        let met = Rendezvous::meet(&meeting, Duration::from_secs(20), Duration::from_secs(20)).unwrap();
        met.exchange("a word", b"word").unwrap().len()
    });
    assert_eq!(hosts, [3; 3]);
    // The run's id is not a valid token.
    let port = free_port();
    thread::scope(|scope| {
        let first = scope.spawn(move || {
            let token = Token::HandedOver("a run".into());
            Rendezvous::meet(&meeting(0, 2, port, &token), Duration::from_secs(2), Duration::from_secs(2)).err()
        });
        call(port);
        for guess in ["a run", ""] {
            let token = given(guess);
            assert!(reach(&meeting(1, 2, port, &token), Instant::now() + Duration::from_millis(200)).is_err());
        }
        assert!(first.join().unwrap().unwrap().to_string().contains("ranks [1] did not come"));
    });
}

#[test]
fn notes_that_do_not_add_up_are_refused() {
    let frame = |notes: &[&[u8]]| -> Vec<u8> {
        notes.iter().flat_map(|note| [&(note.len() as u64).to_le_bytes()[..], note].concat()).collect()
    };
    let whole = frame(&[b"one", b"", b"three"]);
    assert_eq!(split_notes(&whole, 3).unwrap(), [&b"one"[..], b"", b"three"]);
    assert!(split_notes(&whole, 2).is_none() && split_notes(&whole, 4).is_none());
    for length in 0..whole.len() {
        assert!(split_notes(&whole[..length], 3).is_none(), "{length}");
    }
    assert!(split_notes(&u64::MAX.to_le_bytes(), 1).is_none());
    assert!(split_notes(&[&frame(&[b"one"])[..], &[0; 7]].concat(), 1).is_none());
}

/// Simulates a rank that waits for `step 5` by other means, until it hears from the others. It answers the roll call.
fn wait_elsewhere(met: &Rendezvous) -> Error {
    let until = Instant::now() + Duration::from_secs(20);
    loop {
        assert!(Instant::now() < until, "nobody says anything");
        match met.glance("step 5") {
            Ok(true) => return met.call_the_roll("waiting for step 5"),
            Ok(false) => thread::sleep(Duration::from_millis(1)),
            Err(error) => return error,
        }
    }
}

#[test]
fn a_rank_that_is_gone_is_named_at_once_wherever_the_others_wait() {
    let ends = world(3, |rank, port| {
        let met = meet(rank, 3, port, "", 60_000).unwrap();
        (rank != 2).then(|| wait_elsewhere(&met))
    });
    for error in ends.into_iter().flatten() {
        assert_eq!(error.exit_code(), 75);
        assert_eq!(error.to_string(), "waiting for step 5: rank 2 (node-2) is gone");
    }
    // Rank 0 waits for the note of rank 1, which is also late.
    let met = Barrier::new(2);
    let ends = world(3, |rank, port| {
        let own = meet(rank, 3, port, "", 60_000).unwrap();
        let exchange = || Some(own.exchange("step 5", &[]).unwrap_err().to_string());
        match rank {
            0 => (exchange(), met.wait()).0,
            1 => (met.wait(), exchange()).1,
            _ => None,
        }
    });
    for line in ends.into_iter().flatten() {
        assert_eq!(line, "waiting for step 5: rank 2 (node-2) is gone");
    }
}

#[test]
fn the_roll_call_names_who_is_silent_whoever_began_to_wait_first() {
    for impatient in 0..3 {
        let over = Barrier::new(4);
        let ends = world(4, |rank, port| {
            let met = meet(rank, 4, port, "", 500).unwrap();
            let line = (rank < 3).then(|| match rank {
                _ if rank == impatient => met.call_the_roll("waiting for step 5"),
                _ => wait_elsewhere(&met),
            });
            over.wait();
            line
        });
        for error in ends.into_iter().flatten() {
            assert_eq!(error.exit_code(), 75);
            assert_eq!(error.to_string(), "waiting for step 5; rank 3 (node-3) does not answer", "{impatient}");
        }
    }
}

#[test]
fn a_roll_call_is_not_taken_for_a_note() {
    for impatient in 0..3 {
        let ends = world(3, |rank, port| {
            let met = meet(rank, 3, port, "", 20_000).unwrap();
            if rank == impatient {
                met.call_the_roll("waiting for step 5")
            } else {
                met.exchange("step 5", b"a note").unwrap_err()
            }
        });
        for error in ends {
            assert_eq!(error.to_string(), "waiting for step 5; every rank answers", "{impatient}");
        }
    }
}

#[test]
fn ranks_meet_over_ipv4_and_ipv6_once_the_port_is_free() {
    for host in ["127.0.0.1", "::1"] {
        let Ok(keeper) = TcpListener::bind((host, 0)) else {
            // Only a machine without IPv6 may refuse.
            assert_eq!(host, "::1");
            continue;
        };
        let port = keeper.local_addr().unwrap().port();
        let meet = |rank, start| {
            let token = given("ours");
            let meeting = Meeting { address: (host, port), one_machine: false, ..meeting(rank, 2, port, &token) };
            Rendezvous::meet(&meeting, Duration::from_millis(start), Duration::from_secs(20))
        };
        let error = meet(0, 200).err().unwrap();
        assert_eq!(error.exit_code(), 75);
        assert!(error.to_string().contains(&format!("port {port} of {host}")), "{error}");
        thread::scope(|scope| {
            let first = scope.spawn(|| meet(0, 20_000).unwrap().exchange("a word", b"0").unwrap());
            thread::sleep(Duration::from_millis(300));
            drop(keeper);
            // A rank connected to the program that keeps the port would be lost with it.
            let second = meet(1, 20_000).unwrap().exchange("a word", b"1").unwrap();
            assert_eq!(first.join().unwrap(), second);
        });
    }
}

proptest! {
    #[test]
    fn no_bytes_of_a_peer_are_taken_for_more_than_they_are(bytes in vec(any::<u8>(), 0..200), small in vec(0..9_u64, 0..9)) {
        for (said, world_size) in [(bytes, 3), (small.iter().flat_map(|length| length.to_le_bytes()).collect(), small.len())] {
            if let Some(notes) = split_notes(&said, world_size) {
                prop_assert_eq!(notes.iter().map(|note| note.len() + 8).sum::<usize>(), said.len());
            }
            if let Ok((rank, nonce)) = read_hello(&said, world_size) {
                prop_assert_eq!(hello(rank, &nonce), said);
            }
        }
    }
}
