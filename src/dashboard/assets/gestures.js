// Moving about in a plot: wheel with Ctrl, drag with Shift, and fingers.

/** Makes `plot` zoom and move the page's view. */
export function gestures(plot, page) {
  const { over } = plot;
  const position = (event) => event.clientX - over.getBoundingClientRect().left;

  /** The view, as positions on the screen, moved and stretched. */
  const stretch = (from, to) => page.zoom(plot.posToVal(from, 'x'), plot.posToVal(to, 'x'));

  over.addEventListener('wheel', (event) => {
    if (!event.ctrlKey && !event.metaKey) return;
    event.preventDefault();
    const at = position(event);
    const factor = event.deltaY > 0 ? 1.25 : 0.8;
    const width = over.clientWidth;
    stretch(at - at * factor, at + (width - at) * factor);
  }, { passive: false });

  over.addEventListener('mousedown', (event) => {
    if (!event.shiftKey) return;
    event.preventDefault();
    event.stopImmediatePropagation();
    let last = event.clientX;
    const move = ({ clientX }) => {
      const by = last - clientX;
      last = clientX;
      stretch(by, over.clientWidth + by);
    };
    const up = () => removeEventListener('mousemove', move);
    addEventListener('mousemove', move);
    addEventListener('mouseup', up, { once: true });
  }, true);

  // One finger reads values, two zoom; up and down scrolls the page.
  const fingers = new Map();
  over.addEventListener('pointerdown', (event) => {
    if (event.pointerType === 'touch') fingers.set(event.pointerId, position(event));
  });
  over.addEventListener('pointermove', (event) => {
    if (!fingers.has(event.pointerId)) return;
    const before = [...fingers.values()].sort((a, b) => a - b);
    fingers.set(event.pointerId, position(event));
    const now = [...fingers.values()].sort((a, b) => a - b);
    if (now.length === 1) {
      plot.setCursor({ left: now[0], top: 10 });
    } else if (now.length === 2 && now[1] - now[0] > 10) {
      const factor = (before[1] - before[0]) / (now[1] - now[0]);
      const middle = (before[0] + before[1]) / 2;
      const shifted = middle - ((now[0] + now[1]) / 2) * factor;
      stretch(shifted, shifted + over.clientWidth * factor);
    }
  });
  for (const end of ['pointerup', 'pointercancel', 'pointerleave']) {
    over.addEventListener(end, (event) => fingers.delete(event.pointerId));
  }
}
