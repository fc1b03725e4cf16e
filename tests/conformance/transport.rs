use std::io::{self, IoSlice};
use std::sync::Arc;
use std::time::{Duration, Instant};

#[cfg(unix)]
use luna_broker::transport::Attachment;
use luna_broker::transport::{
    Connection, FrameReader, FrameWriter, HEADER_BYTES, Listener, LocalConnection, LocalListener, MemoryListener,
    TransportError, Wait, begin_frame, finish_frame,
};

/// Two connected ends, and what keeps them so.
struct Ends {
    one: Arc<dyn Connection>,
    other: Arc<dyn Connection>,
    _folder: Option<tempfile::TempDir>,
}

fn memory() -> Ends {
    let listener = MemoryListener::new();
    let one = Arc::new(listener.connect().unwrap());
    Ends { one, other: listener.accept().unwrap().unwrap(), _folder: None }
}

fn address(folder: &tempfile::TempDir) -> String {
    if cfg!(windows) {
        format!("luna-broker-test-{}", folder.path().file_name().unwrap().to_string_lossy())
    } else {
        folder.path().join("socket").to_string_lossy().into_owned()
    }
}

fn local() -> Ends {
    let folder = tempfile::tempdir().unwrap();
    let listener = LocalListener::bind(&address(&folder)).unwrap();
    let target = address(&folder);
    let connecting = std::thread::spawn(move || LocalConnection::connect(&target).unwrap());
    let other = listener.accept().unwrap().unwrap();
    Ends { one: Arc::new(connecting.join().unwrap()), other, _folder: Some(folder) }
}

fn frame(message: &[u8], payload: u64) -> Vec<u8> {
    let mut frame = Vec::new();
    begin_frame(&mut frame);
    frame.extend_from_slice(message);
    finish_frame(&mut frame, payload);
    frame
}

fn send(connection: &dyn Connection, message: &[u8], payload: &[u8]) {
    let frame = frame(message, payload.len() as u64);
    let sent = FrameWriter::default().write(connection, &frame, payload, &mut Vec::new(), Wait::Block);
    assert!(sent.unwrap());
}

fn reader() -> FrameReader {
    FrameReader::new(1 << 20, 1 << 30)
}

fn frames_arrive_whole_and_in_order(ends: &Ends) {
    let mut reader = reader();
    for message in [&b"first"[..], b"", &[7; 100_000]] {
        send(&*ends.one, message, &[]);
    }
    for message in [&b"first"[..], b"", &[7; 100_000]] {
        let header = reader.next(&*ends.other, None).unwrap();
        assert_eq!((header.message, header.payload), (message.len(), 0));
        assert_eq!(reader.message(), message);
    }
}

fn a_payload_far_larger_than_any_buffer_crosses_unchanged(ends: &Ends) {
    let payload: Vec<u8> = (0..5_000_000u32).map(|at| (at % 251) as u8).collect();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            send(&*ends.one, b"with payload", &payload);
            send(&*ends.one, b"after it", &[]);
        });
        let mut reader = reader();
        assert_eq!(reader.next(&*ends.other, None).unwrap().payload, payload.len() as u64);
        let mut received = vec![0; payload.len()];
        let (head, tail) = received.split_at_mut(1_234_567);
        reader.read_payload(&*ends.other, head).unwrap();
        assert_eq!(reader.message(), b"with payload", "the message stays readable beside its payload");
        reader.read_payload(&*ends.other, tail).unwrap();
        assert!(received == payload);
        reader.next(&*ends.other, None).unwrap();
        assert_eq!(reader.message(), b"after it");
    });
}

fn a_payload_that_nobody_reads_is_skipped(ends: &Ends) {
    std::thread::scope(|scope| {
        scope.spawn(|| {
            send(&*ends.one, b"unwanted", &vec![1; 1_000_000]);
            send(&*ends.one, b"wanted", &[]);
        });
        let mut reader = reader();
        reader.next(&*ends.other, None).unwrap();
        reader.next(&*ends.other, None).unwrap();
        assert_eq!(reader.message(), b"wanted");
    });
}

fn a_pause_within_a_payload_never_turns_its_bytes_into_frames(ends: &Ends) {
    // A payload of frames: whoever loses count of it takes them for messages.
    let smuggled = frame(b"never a message", 0).repeat(20);
    let whole = [frame(b"before", smuggled.len() as u64), smuggled.clone()].concat();
    let (sent, late) = whole.split_at(whole.len() - smuggled.len() / 2);
    let soon = Some(Duration::from_secs(1));
    let mut reader = reader().payload_patience(Duration::from_millis(20));
    ends.one.write(&[IoSlice::new(sent)], &mut Vec::new(), Wait::Block).unwrap();
    reader.next(&*ends.other, soon).unwrap();
    let mut target = vec![0; smuggled.len()];
    assert!(matches!(reader.read_payload(&*ends.other, &mut target), Err(TransportError::TimedOut)));
    // What is left of it is still skipped, however often the peer pauses.
    assert!(matches!(reader.next(&*ends.other, soon), Err(TransportError::TimedOut)));
    ends.one.write(&[IoSlice::new(late)], &mut Vec::new(), Wait::Block).unwrap();
    send(&*ends.one, b"after", &[]);
    reader.next(&*ends.other, soon).unwrap();
    assert_eq!(reader.message(), b"after");
}

fn a_frame_beyond_the_limit_is_refused_before_it_is_read(ends: &Ends) {
    send(&*ends.one, &[0; 1001], &[]);
    let refused = FrameReader::new(1000, 0).next(&*ends.other, None);
    assert!(matches!(refused, Err(TransportError::FrameTooLong { length: 1001, limit: 1000 })));
}

fn a_payload_beyond_the_limit_is_refused_before_it_is_read(ends: &Ends) {
    let frame = frame(b"large", u64::MAX);
    FrameWriter::default().write(&*ends.one, &frame, &[], &mut Vec::new(), Wait::Block).unwrap();
    let refused = FrameReader::new(1000, 5000).next(&*ends.other, None);
    assert!(matches!(refused, Err(TransportError::FrameTooLong { length: u64::MAX, limit: 5000 })));
}

fn a_peer_that_leaves_in_the_middle_of_a_frame_is_noticed(ends: &Ends) {
    let whole = frame(&[1; 100], 0);
    ends.one.write(&[IoSlice::new(&whole[..50])], &mut Vec::new(), Wait::Block).unwrap();
    ends.one.close();
    assert!(matches!(reader().next(&*ends.other, None), Err(TransportError::Closed)));
}

fn a_read_gives_up_after_its_time_and_can_be_repeated(ends: &Ends) {
    let mut reader = reader();
    let soon = Some(Duration::from_millis(20));
    assert!(matches!(reader.next(&*ends.other, soon), Err(TransportError::TimedOut)));
    let whole = frame(b"in two parts", 0);
    ends.one.write(&[IoSlice::new(&whole[..HEADER_BYTES + 3])], &mut Vec::new(), Wait::Block).unwrap();
    assert!(matches!(reader.next(&*ends.other, soon), Err(TransportError::TimedOut)));
    ends.one.write(&[IoSlice::new(&whole[HEADER_BYTES + 3..])], &mut Vec::new(), Wait::Block).unwrap();
    reader.next(&*ends.other, None).unwrap();
    assert_eq!(reader.message(), b"in two parts");
}

fn a_read_waits_as_long_as_it_may_whatever_the_one_before_it_did(ends: &Ends) {
    let short = Duration::from_millis(20);
    let long = Duration::from_millis(150);
    let times_out = |limit| {
        let started = Instant::now();
        assert_eq!(ends.other.read(&mut [0], None, Some(limit)).unwrap_err().kind(), io::ErrorKind::TimedOut);
        started.elapsed()
    };
    for limit in [short, long, short, long, long] {
        let waited = times_out(limit);
        // Half of it: clocks of some systems are coarse.
        assert!(waited >= limit / 2, "{waited:?} instead of {limit:?}");
    }
    times_out(short);
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        scope.spawn(|| tell.send(ends.other.read(&mut [0], None, None)).unwrap());
        assert!(told.recv_timeout(long).is_err(), "a read without a limit ended before anything came");
        ends.one.write(&[IoSlice::new(b"x")], &mut Vec::new(), Wait::Block).unwrap();
        assert_eq!(told.recv().unwrap().unwrap(), 1);
    });
}

fn closing_wakes_a_blocked_read(ends: &Ends) {
    std::thread::scope(|scope| {
        let reading = scope.spawn(|| reader().next(&*ends.other, None).map(|_| ()));
        ends.other.close();
        ends.other.close();
        assert!(matches!(reading.join().unwrap(), Err(TransportError::Closed)));
    });
}

fn writing_to_a_peer_that_left_is_an_error(ends: &Ends) {
    ends.other.close();
    let deadline = Instant::now() + Duration::from_secs(10);
    let error = loop {
        assert!(Instant::now() < deadline, "the write kept succeeding");
        match ends.one.write(&[IoSlice::new(&[0; 4096])], &mut Vec::new(), Wait::Never) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return println!("skipped: cannot tell at once"),
            Err(error) => break error,
        }
    };
    assert!(matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset), "{error:?}");
}

fn a_peer_that_does_not_read_is_noticed_without_waiting(ends: &Ends) {
    let chunk = [0; 64 << 10];
    let filled = (0..1000).find_map(|_| ends.one.write(&[IoSlice::new(&chunk)], &mut Vec::new(), Wait::Never).err());
    assert_eq!(filled.map(|error| error.kind()), Some(io::ErrorKind::WouldBlock));
}

#[cfg(unix)]
fn attachments_arrive_in_order_with_or_before_their_frames(ends: &Ends) {
    use std::io::{Read, Seek, Write};
    let mut reader = reader();
    for name in ["one", "two"] {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(name.as_bytes()).unwrap();
        let mut attachments = vec![Attachment::Fd(file.into())];
        let frame = frame(name.as_bytes(), 0);
        FrameWriter::default().write(&*ends.one, &frame, &[], &mut attachments, Wait::Block).unwrap();
        assert!(attachments.is_empty(), "what was sent is no longer the sender's");
    }
    for name in ["one", "two"] {
        reader.next(&*ends.other, None).unwrap();
        assert_eq!(reader.message(), name.as_bytes());
        let [Attachment::Fd(fd)] = &reader.take_attachments(1)[..] else { panic!("one descriptor came with {name}") };
        let mut file = std::fs::File::from(fd.try_clone().unwrap());
        file.rewind().unwrap();
        let mut content = String::new();
        file.read_to_string(&mut content).unwrap();
        assert_eq!(content, name);
    }
    assert!(reader.take_attachments(1).is_empty());
}

fn each_side_is_told_who_the_other_is(ends: &Ends) {
    assert_eq!(ends.one.peer().pid, Some(std::process::id()));
    assert_eq!(ends.other.peer(), ends.one.peer());
}

macro_rules! suite {
    ($($implementation:ident)*) => {$(
        mod $implementation {
            suite! { @rules $implementation;
                frames_arrive_whole_and_in_order
                a_payload_far_larger_than_any_buffer_crosses_unchanged
                a_payload_that_nobody_reads_is_skipped
                a_pause_within_a_payload_never_turns_its_bytes_into_frames
                a_frame_beyond_the_limit_is_refused_before_it_is_read
                a_payload_beyond_the_limit_is_refused_before_it_is_read
                a_peer_that_leaves_in_the_middle_of_a_frame_is_noticed
                a_read_gives_up_after_its_time_and_can_be_repeated
                a_read_waits_as_long_as_it_may_whatever_the_one_before_it_did
                closing_wakes_a_blocked_read
                writing_to_a_peer_that_left_is_an_error
                a_peer_that_does_not_read_is_noticed_without_waiting
                each_side_is_told_who_the_other_is
            }
            #[cfg(unix)]
            suite! { @rules $implementation; attachments_arrive_in_order_with_or_before_their_frames }
        }
    )*};
    (@rules $implementation:ident; $($rule:ident)*) => {$(
        #[test]
        fn $rule() {
            super::$rule(&super::$implementation());
        }
    )*};
}

suite! { memory local }

#[test]
fn a_closed_listener_wakes_whoever_accepts() {
    let folder = tempfile::tempdir().unwrap();
    let listeners: [Arc<dyn Listener>; 2] =
        [Arc::new(MemoryListener::new()), Arc::new(LocalListener::bind(&address(&folder)).unwrap())];
    for listener in listeners {
        std::thread::scope(|scope| {
            let accepting = scope.spawn(|| listener.accept().map(|connection| connection.is_none()));
            listener.close();
            assert!(matches!(accepting.join().unwrap(), Ok(true)));
        });
    }
}

#[test]
fn a_second_listener_at_the_same_address_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let _first = LocalListener::bind(&address(&folder)).unwrap();
    let second = LocalListener::bind(&address(&folder));
    assert!(matches!(second, Err(TransportError::AlreadyServed { .. })), "{second:?}");
}

#[test]
fn nobody_at_the_address_is_said_with_the_address() {
    let folder = tempfile::tempdir().unwrap();
    let error = LocalConnection::connect(&address(&folder)).unwrap_err();
    assert!(error.to_string().contains(&address(&folder)), "{error}");
}

#[cfg(unix)]
mod socket_files {
    use super::*;

    #[test]
    fn a_dead_socket_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        drop(std::os::unix::net::UnixListener::bind(address(&folder)).unwrap());
        assert!(std::path::Path::new(&address(&folder)).exists(), "the file outlives its listener");
        LocalListener::bind(&address(&folder)).unwrap();
    }

    #[test]
    fn a_live_socket_of_another_program_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let _other = std::os::unix::net::UnixListener::bind(address(&folder)).unwrap();
        assert!(matches!(LocalListener::bind(&address(&folder)), Err(TransportError::AlreadyServed { .. })));
    }

    #[test]
    fn a_file_that_is_no_socket_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(address(&folder), "precious").unwrap();
        assert!(matches!(LocalListener::bind(&address(&folder)), Err(TransportError::NotASocket { .. })));
        assert_eq!(std::fs::read_to_string(address(&folder)).unwrap(), "precious");
    }

    #[test]
    fn the_socket_and_a_folder_made_for_it_are_this_users_only() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let made = folder.path().join("made");
        let path = made.join("socket");
        let _listener = LocalListener::bind(&path.to_string_lossy()).unwrap();
        let mode = |path: &std::path::Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&made), mode(&path)), (0o700, 0o600));
    }

    #[test]
    fn the_socket_is_gone_when_its_listener_is() {
        let folder = tempfile::tempdir().unwrap();
        drop(LocalListener::bind(&address(&folder)).unwrap());
        assert!(!std::path::Path::new(&address(&folder)).exists());
    }
}
