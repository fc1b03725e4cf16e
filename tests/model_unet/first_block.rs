//! The forward in parts, as a cache of the first block runs it.

use luna_broker::model::torch::Patches;
use luna_broker::model::{Control, ModelError, UnetInput};
use tch::Tensor;

use crate::{Cases, TOLERANCE, difference, forward, golden, load};

#[test]
fn the_parts_together_are_the_whole_bit_by_bit() {
    let Some(folder) = golden() else { return };
    let others = [("ssd", "ssd.diffusers"), ("sd2", "sd2.checkpoint"), ("koala", "koala.bare")];
    for (model, file) in [("sd15", "sd15.checkpoint"), ("sdxl", "sdxl.bare")].into_iter().chain(others) {
        let (unet, cases) = (load(&folder, file), Cases::of(&folder, model));
        for case in cases.names() {
            let input = cases.input(case);
            let started = unet.start(&input, &Patches::none()).expect("it starts");
            let residual = started.h1() - started.h0();
            assert!(residual.abs().mean(None).double_value(&[]) > 1e-2, "the first block does something");
            let end = unet.rest(&started).expect("it runs");
            assert_eq!(
                end.size(),
                started.h1().size(),
                "{model} {case}: what a cache adds has the shape of what it kept"
            );
            let out = unet.finish(&started, &end).expect("it ends");
            assert_eq!(out, forward(&unet, &input), "{model} {case}");
            // What a cache does on a hit: the same end, from what the first block gave and what was kept.
            let kept = &end - started.h1();
            let hit = unet.finish(&started, &(started.h1() + kept)).expect("it ends");
            assert!(difference(&hit, &out) <= TOLERANCE, "{model} {case}");
        }
    }
}

#[test]
fn a_start_is_not_changed_by_what_follows() {
    let Some(folder) = golden() else { return };
    let (unet, cases) = (load(&folder, "sd15.checkpoint"), Cases::of(&folder, "sd15"));
    for case in cases.names() {
        let input = cases.input(case);
        let copies = input.try_map(&mut |tensor| Ok::<_, ()>(tensor.copy())).expect("copies");
        let started = unet.start(&input, &Patches::none()).expect("it starts");
        let (h0, h1) = (started.h0().copy(), started.h1().copy());
        let first = unet.rest(&started).expect("it runs");
        assert_eq!(first, unet.rest(&started).expect("it runs again"), "{case}");
        let end = first.copy();
        assert_eq!(unet.finish(&started, &first).expect("it ends"), unet.finish(&started, &end).expect("again"));
        assert_eq!((started.h0(), started.h1(), &first), (&h0, &h1, &end), "{case}");
        same(&input, &copies);
    }
}

fn same(left: &UnetInput<Tensor>, right: &UnetInput<Tensor>) {
    assert_eq!((&left.x, &left.timesteps, &left.context), (&right.x, &right.timesteps, &right.context));
    let lists = |input: &UnetInput<Tensor>| {
        let Control { input, middle, output } =
            input.control.as_ref()?.try_map(&mut |tensor| Ok::<_, ()>(tensor.copy())).ok()?;
        Some(input.into_iter().chain(middle).chain(output).collect::<Vec<_>>())
    };
    assert_eq!(lists(left), lists(right), "control is not written to");
}

pub(crate) fn rows_of(order: &[u32]) -> Tensor {
    Tensor::from_slice(&order.iter().map(|&row| i64::from(row)).collect::<Vec<_>>())
}

#[test]
fn some_rows_can_be_run_without_the_others() {
    let Some(folder) = golden() else { return };
    let (unet, cases) = (load(&folder, "sd15.checkpoint"), Cases::of(&folder, "sd15"));
    for case in cases.names() {
        let input = cases.input(case);
        let whole = forward(&unet, &input);
        let started = unet.start(&input, &Patches::none()).expect("it starts");
        let rows = u32::try_from(input.x.size()[0]).expect("few rows");
        for order in [vec![0], vec![rows - 1, 0], (1..rows).collect()] {
            let some = started.select(&order).expect("rows that are there");
            let end = unet.rest(&some).expect("it runs");
            let out = unet.finish(&some, &end).expect("it ends");
            let expected = whole.index_select(0, &rows_of(&order));
            assert!(difference(&out, &expected) <= TOLERANCE, "{case} {order:?}");
        }
        let beyond = started.select(&[0, rows]);
        assert!(matches!(beyond, Err(ModelError::Executor { .. })));
    }
}

#[test]
fn the_last_layers_take_nothing_of_another_size() {
    let Some(folder) = golden() else { return };
    let (unet, cases) = (load(&folder, "sd15.checkpoint"), Cases::of(&folder, "sd15"));
    let started = unet.start(&cases.input("plain"), &Patches::none()).expect("it starts");
    for wrong in [Tensor::new(), started.h1().narrow(0, 0, 1), started.h1().narrow(2, 0, 1), started.h1().flatten(0, 1)]
    {
        assert!(matches!(unet.finish(&started, &wrong), Err(ModelError::Executor { .. })));
    }
}
