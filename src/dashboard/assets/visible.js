// Text of a model as it is: what has no picture is given one, and nothing is taken for HTML.

import { el } from './dom.js';

/** Control characters but for tab and line end, invisible and direction-changing ones, and the sign
 * for bytes that are no UTF-8. */
const ODD = /([\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufffd])/u;

/** Nodes that show `text`. */
export function visible(text) {
  return text.split(ODD).map((piece, i) => {
    if (i % 2 === 0) return document.createTextNode(piece);
    const code = piece.codePointAt(0);
    if (code === 0xfffd) return el('span', { class: 'odd bad-byte', title: 'bytes that are not valid UTF-8' }, '\ufffd');
    const hex = code.toString(16).toUpperCase();
    const name = `U+${hex.padStart(4, '0')}`;
    const shown = code < 256 ? `\\x${hex.padStart(2, '0')}` : name;
    return el('span', { class: 'odd', title: name }, shown);
  });
}
