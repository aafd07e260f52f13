//! Reading prompts with the parallel scan.

use burn::tensor::{Device, Int, Tensor, TensorData};

use crate::model::{LayerState, MambaLm, State};

/// Positions that go through the model at once: longer prompts are read in pieces, so that their
/// length does not cost memory.
const POSITIONS: usize = 8192;

/// What generation starts from without a prompt: the byte after which a text most often begins.
const START: u8 = b'\n';

/// Reads prompts; returns the logits behind each, `[B, V]`, and the memory of all.
///
/// Prompts of one length are read together, equal ones once.
pub(super) fn read(model: &MambaLm, device: &Device, prompts: &[&[u8]]) -> (Tensor<2>, State) {
    let start = [START];
    let prompts: Vec<&[u8]> = prompts
        .iter()
        .map(|prompt| if prompt.is_empty() { &start } else { *prompt })
        .collect();
    let mut unique = prompts.clone();
    unique.sort_unstable_by_key(|prompt| (prompt.len(), *prompt));
    unique.dedup();

    let mut logits = Vec::new();
    let mut states = Vec::new();
    let mut rest = unique.as_slice();
    while let Some(first) = rest.first() {
        let alike = rest.partition_point(|prompt| prompt.len() == first.len());
        let most = (POSITIONS / first.len()).max(1);
        let (group, others) = rest.split_at(alike.min(most));
        let (last, state) = read_alike(model, device, group);
        logits.push(last);
        states.push(state);
        rest = others;
    }
    if prompts == unique {
        return join(logits, states);
    }
    let order: Vec<i32> = prompts
        .iter()
        .map(|prompt| unique.partition_point(|it| (it.len(), *it) < (prompt.len(), *prompt)) as i32)
        .collect();
    let order = Tensor::<1, Int>::from_data(order.as_slice(), device);
    let (logits, state) = join(logits, states);
    let layers = state.layers.into_iter().map(|layer| LayerState {
        h: layer.h.select(0, order.clone()),
        window: layer.window.select(0, order.clone()),
    });
    let state = State {
        layers: layers.collect(),
    };
    (logits.select(0, order), state)
}

/// Reads prompts of one length.
fn read_alike(model: &MambaLm, device: &Device, prompts: &[&[u8]]) -> (Tensor<2>, State) {
    let length = prompts[0].len();
    let piece = (POSITIONS / prompts.len()).max(1);
    let mut from = 0;
    let mut state = None;
    loop {
        let to = (from + piece).min(length);
        let values: Vec<i32> = prompts
            .iter()
            .flat_map(|prompt| prompt[from..to].iter().map(|byte| i32::from(*byte)))
            .collect();
        let data = TensorData::new(values, [prompts.len(), to - from]);
        let (logits, next) = model.forward_last(Tensor::from_data(data, device), state, 1);
        if to == length {
            let [batch, _, vocabulary] = logits.dims();
            return (logits.reshape([batch, vocabulary]), next);
        }
        state = Some(next);
        from = to;
    }
}

/// Sequences of several states, one after the other.
fn join(mut logits: Vec<Tensor<2>>, mut states: Vec<State>) -> (Tensor<2>, State) {
    if states.len() == 1 {
        return (logits.remove(0), states.remove(0));
    }
    let layers = (0..states[0].layers.len()).map(|layer| {
        let all = |part: fn(&LayerState) -> &Tensor<3>| {
            let parts = states
                .iter()
                .map(|state| part(&state.layers[layer]).clone());
            Tensor::cat(parts.collect(), 0)
        };
        LayerState {
            h: all(|layer| &layer.h),
            window: all(|layer| &layer.window),
        }
    });
    let state = State {
        layers: layers.collect(),
    };
    (Tensor::cat(logits, 0), state)
}
