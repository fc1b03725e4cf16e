//! Clients whose process forks.

use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::file::counted;
use crate::leases::{holders, only};
use crate::obey::{is, worker};
use crate::scene::Scene;

/// Longer than any machine takes for what a child is told to do: one that waits for a lock waits for ever.
const PATIENCE_SECONDS: u32 = 30;

/// Forks, and has the child do something; how the child ended.
pub(crate) fn in_a_child(play: impl FnOnce()) -> String {
    // SAFETY: the child has this thread alone. It uses the allocator, which the C library makes usable in a child, and
    // what the play is about: that nothing else of the parent's is needed. It leaves by `_exit`.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: neither touches memory; the child is ended by the signal where it hangs.
        unsafe { libc::alarm(PATIENCE_SECONDS) };
        let played = catch_unwind(AssertUnwindSafe(play));
        // SAFETY: as above.
        unsafe { libc::_exit(i32::from(played.is_err())) };
    }
    let mut status = 0;
    // SAFETY: the child was forked above and nobody else waits for it; the pointer is valid for the call.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    match status {
        0 => "done".to_owned(),
        other => format!("the child ended with {other:#x}"),
    }
}

#[test]
fn a_forked_child_neither_speaks_for_its_parent_nor_gives_back_what_the_parent_has() {
    let scene = Scene::new(&[]);
    let path = counted(&scene.place, "model.safetensors", 2, 5000);
    let mut parent = worker(&scene, "parent");
    for command in [&format!("attach {}", path.display()), "keep t1", "permit 1", "fork", "check"] {
        assert_eq!(parent.ask(command), "done", "{command}");
    }
    assert_eq!((parent.ask("first t0"), parent.ask("kept")), ("0".to_owned(), "1000".to_owned()));
    assert_eq!(holders(&only(&scene)), [("parent", 1)]);
    let mut other = worker(&scene, "other");
    assert!(is(&other.ask("hurry"), luna_broker::ErrorKind::Timeout), "the turn is the parent's");
    assert_eq!((parent.ask("release"), other.ask("hurry")), ("done".to_owned(), "done".to_owned()));
    scene.check_bystander();
}
