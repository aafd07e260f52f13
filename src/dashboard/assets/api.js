// Talking to the server.

/** JSON from an address with parameters; undefined ones are left out. */
export async function get(path, parameters = {}) {
  const query = new URLSearchParams();
  for (const [key, value] of Object.entries(parameters)) {
    if (value !== undefined && value !== null) query.set(key, value);
  }
  const answer = await fetch(`/api/${path}?${query}`);
  if (!answer.ok) throw new Error(`${path}: ${answer.status}`);
  return answer.json();
}

/** Calls `handle(event, data)` for what the server tells: open, error, runs, rows, lagged. */
export function listen(handle) {
  const pass = ({ event, data }) => handle(event, data ? JSON.parse(data) : null);
  if (typeof SharedWorker === 'function') {
    const worker = new SharedWorker('/assets/events-worker.js');
    worker.port.onmessage = ({ data }) => pass(data);
    addEventListener('pagehide', () => worker.port.postMessage('bye'));
    // Back from the browser's cache of pages: the worker has forgotten this one.
    addEventListener('pageshow', ({ persisted }) => persisted && location.reload());
    return;
  }
  // Browsers without such workers, as on some phones: a hidden page lets its connection go.
  let source = null;
  const connect = () => {
    if (document.hidden || source) return;
    source = new EventSource('/api/events');
    source.onopen = () => handle('open', null);
    source.onerror = () => handle('error', null);
    for (const event of ['runs', 'rows', 'lagged']) {
      source.addEventListener(event, ({ data }) => pass({ event, data }));
    }
  };
  document.addEventListener('visibilitychange', () => {
    if (document.hidden) {
      source?.close();
      source = null;
    } else connect();
  });
  connect();
}
