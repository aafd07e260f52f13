// One connection for all pages of a browser: it allows six to a server, and each page would take one.

const ports = new Set();
let source = null;
let last = null; // the newest list of runs, for pages that come later

function tell(message) {
  for (const port of ports) port.postMessage(message);
}

function connect() {
  source = new EventSource('/api/events');
  source.onopen = () => tell({ event: 'open' });
  source.onerror = () => {
    tell({ event: 'error' });
    // The browser tries again by itself, unless the answer was a refusal.
    if (source.readyState === EventSource.CLOSED) setTimeout(connect, 3000);
  };
  for (const event of ['runs', 'rows', 'lagged']) {
    source.addEventListener(event, ({ data }) => {
      if (event === 'runs') last = data;
      tell({ event, data });
    });
  }
}

self.onconnect = ({ ports: [port] }) => {
  ports.add(port);
  port.onmessage = ({ data }) => {
    if (data === 'bye') ports.delete(port);
  };
  if (!source) connect();
  else {
    if (source.readyState === EventSource.OPEN) port.postMessage({ event: 'open' });
    if (last) port.postMessage({ event: 'runs', data: last });
  }
};
