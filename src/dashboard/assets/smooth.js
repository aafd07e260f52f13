// The exponential moving average of TensorBoard, free of the pull of its start.

/**
 * The debiased average of `values` (null where there is none): with weight w of the past,
 * s ← w·s + (1-w)·v and the result is s / (1 - wⁿ) after n values.
 *
 * A point that stands for `counts[i]` values with that mean counts as often, so that a thinned-out
 * line is as smooth as the whole one: w becomes wᶜ. Counts need not be whole.
 */
export function smooth(values, weight, counts = null) {
  const out = new Array(values.length).fill(null);
  let sum = 0;
  let mass = 0;
  for (let i = 0; i < values.length; i++) {
    const value = values[i];
    if (value === null || value === undefined) continue;
    const past = counts && counts[i] !== 1 ? weight ** counts[i] : weight;
    sum = past * sum + (1 - past) * value;
    mass = past * mass + (1 - past);
    out[i] = sum / mass;
  }
  return out;
}
