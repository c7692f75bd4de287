/**
 * What SegQC-Net would change of the mask, box by box. Nothing of it is changed before a box is taken.
 *
 * @typedef {import('./server.js').Scan} Scan
 * @typedef {import('./server.js').Offer} Offer
 * @typedef {import('./server.js').BoxToTake} BoxToTake
 * @typedef {import('./mask.js').Mask} Mask
 *
 * @typedef {BoxToTake & { places: number[], adds: number, outline: string }} ProposedBox where it changes voxels, how
 *   many it adds to the structure, and a path around them in the image's columns and rows
 */
export class Proposal {
  /**
   * @param {Scan} scan
   * @param {Offer} offer
   * @param {Uint8Array} before the label that it was made of, image by image
   * @param {Uint8Array} after the proposal
   */
  constructor(scan, offer, before, after) {
    this.scan = scan;
    this.version = offer.version;
    this.madeOf = offer.made_of;
    this.after = after;
    this.boxes = offer.boxes.map(box => toTake(scan, box, before, after));
    /** those that were taken, perhaps undone since @type {Set<ProposedBox>} */
    this.pressed = new Set();
    /** the one that is looked at @type {ProposedBox | null} */
    this.chosen = null;
  }

  /** Whether there is something of a box that the mask does not have. @param {Mask} mask @param {ProposedBox} box */
  isOpen(mask, box) {
    return box.places.some(place => mask.at(place) !== this.after[place]);
  }

  /** Those that are not as proposed in the mask. @param {Mask} mask */
  open(mask) {
    return this.boxes.filter(box => this.isOpen(mask, box));
  }

  /** Those of which something that was taken is in the mask; undone ones are not. @param {Mask} mask */
  taken(mask) {
    return this.boxes.filter(
      box => this.pressed.has(box) && box.places.some(place => mask.at(place) === this.after[place])
    );
  }

  /**
   * Change the mask as proposed, in one step that can be undone.
   *
   * @param {Mask} mask
   * @param {ProposedBox[]} boxes
   */
  take(mask, boxes) {
    boxes.forEach(box => this.pressed.add(box));
    mask.edit(boxes.flatMap(box => box.places.map(place => /** @type {[number, number]} */ ([place, this.after[place]]))));
  }
}

/**
 * A box with the voxels that it changes: those that differ and are of its structure, before or after.
 *
 * @param {Scan} scan
 * @param {BoxToTake} box
 * @param {Uint8Array} before
 * @param {Uint8Array} after
 * @returns {ProposedBox}
 */
function toTake(scan, box, before, after) {
  const first = scan.instances.indexOf(box.instance) * scan.rows * scan.columns;
  const places = [];
  let adds = 0;
  for (let row = box.rows[0]; row < box.rows[1]; row += 1) {
    for (let column = box.columns[0]; column < box.columns[1]; column += 1) {
      const place = first + row * scan.columns + column;
      const joins = box.values.includes(after[place]);
      if (before[place] !== after[place] && (joins || box.values.includes(before[place]))) {
        places.push(place);
        adds += joins ? 1 : 0;
      }
    }
  }
  return { ...box, places, adds, outline: outlineOf(places.map(place => place - first), scan.columns) };
}

/**
 * The edges between pixels of a set and all others, as a path.
 *
 * @param {number[]} places in one image, row by row
 * @param {number} columns
 */
function outlineOf(places, columns) {
  const inside = new Set(places);
  return places
    .flatMap(place => {
      const [column, row] = [place % columns, Math.floor(place / columns)];
      return [
        inside.has(place - columns) ? '' : `M${column} ${row}h1`,
        inside.has(place + columns) ? '' : `M${column} ${row + 1}h1`,
        column > 0 && inside.has(place - 1) ? '' : `M${column} ${row}v1`,
        column < columns - 1 && inside.has(place + 1) ? '' : `M${column + 1} ${row}v1`,
      ];
    })
    .join('');
}
