/**
 * The label map that is painted: in Cornerstone's images, slice by slice, with its changes and their undoing.
 *
 * Slices are matched by SOPInstanceUID: the viewer's order of images is its own.
 *
 * @typedef {import('./server.js').Scan} Scan
 */
import { currentInstance, instanceOf, viewportsOf } from './ohif.js';

const MAX_UNDO_BYTES = 128e6;
const FILL = 0.25;
const MODIFIED = 'CORNERSTONE_TOOLS_SEGMENTATION_DATA_MODIFIED';

let made = 0;

/** @typedef {{ slice: number, before: Uint8Array, after: Uint8Array }[]} Step what one stroke changed */

export class Mask extends EventTarget {
  /**
   * @param {any} services OHIF's
   * @param {Scan} scan
   * @param {string} id of OHIF's segmentation
   */
  constructor(services, scan, id) {
    super();
    this.services = services;
    this.scan = scan;
    this.id = id;
    this.size = scan.rows * scan.columns;
    /** what was loaded or submitted last */
    this.start = new Uint8Array(this.size * scan.instances.length);
    /** what was seen last: a stroke is what differs from it */
    this.seen = new Uint8Array(this.start.length);
    /** changed voxels of each slice, against the start */
    this.changed = new Uint32Array(scan.instances.length);
    /** @type {Step[]} */
    this.done = [];
    /** @type {Step[]} */
    this.undone = [];
    /** @type {Set<number>} values that are not shown */
    this.hidden = new Set();
    this.shown = Promise.resolve();
    this.isPressed = false;
    this.isTouched = false;
    this.images = this.#images();
    this.onModified = (/** @type {CustomEvent} */ event) => {
      if (event.detail.segmentationId === id) {
        this.isTouched = true;
        if (this.isPressed) {
          this.#reveal(scan.instances.indexOf(currentInstance(services, scan) ?? ''));
        }
        this.#look();
      }
    };
    this.onPointer = (/** @type {Event} */ event) => {
      this.isPressed = event.type === 'pointerdown';
      if (!this.isPressed) {
        setTimeout(() => this.#look()); // after the tools have ended their stroke
      }
    };
    window.cornerstone.eventTarget.addEventListener(MODIFIED, this.onModified);
    for (const type of ['pointerdown', 'pointerup', 'pointercancel']) {
      window.addEventListener(type, this.onPointer, true);
    }
  }

  /**
   * @param {any} services
   * @param {any} displaySet the scan's series as OHIF knows it
   * @param {Scan} scan
   * @param {Uint8Array | null} voxels those to begin with, image by image; null for an empty label map
   */
  static async create(services, displaySet, scan, voxels) {
    const id = `segqc ${scan.scan} ${(made += 1)}`;
    const segments = scan.segments.map((s, i) => [s.value, { label: s.name, active: i === 0 }]);
    await services.segmentationService.createLabelmapForDisplaySet(displaySet, {
      segmentationId: id,
      label: scan.label ? `Version ${scan.label.version}` : 'New label map',
      segments: Object.fromEntries(segments),
    });
    const mask = new Mask(services, scan, id);
    if (voxels) {
      mask.load(voxels);
    }
    return mask;
  }

  /** Show the mask in the viewports that show the scan and do not have it yet, one call after the other. */
  async show() {
    this.shown = this.shown.then(() => this.#show());
    await this.shown;
  }

  async #show() {
    const { segmentationService } = this.services;
    for (const { viewportId } of viewportsOf(this.services, this.scan)) {
      if (segmentationService.getSegmentationRepresentations(viewportId, { segmentationId: this.id }).length) {
        continue;
      }
      await segmentationService.addSegmentationRepresentation(viewportId, { segmentationId: this.id });
      for (const { value, colour } of this.scan.segments) {
        const rgb = [1, 3, 5].map(i => parseInt(colour.slice(i, i + 2), 16));
        segmentationService.setSegmentColor(viewportId, this.id, value, [...rgb, 255]);
        if (this.hidden.has(value)) {
          this.#setVisibility(viewportId, value, false);
        }
      }
    }
    segmentationService.setStyle({ type: 'Labelmap' }, { fillAlpha: FILL, fillAlphaInactive: FILL, outlineWidth: 2 });
    window.cornerstoneTools.segmentation.triggerSegmentationEvents.triggerSegmentationDataModified(this.id);
  }

  /** Take the place of a start: what was loaded is no change. @param {Uint8Array} voxels */
  load(voxels) {
    this.start.set(voxels);
    this.#write(voxels);
    this.seen.set(voxels);
    this.done = [];
    this.undone = [];
    this.#count();
    this.#redraw();
  }

  /** Put other voxels in the place of these, as a change that can be undone. @param {Uint8Array} voxels */
  replace(voxels) {
    this.#write(voxels);
    this.#redraw(); // which is looked at as any other change
  }

  /**
   * Change some voxels, as a change that can be undone.
   *
   * @param {Iterable<[number, number]>} changes places, image by image in the order of the scan's instances, and values
   */
  edit(changes) {
    for (const [place, value] of changes) {
      this.images[Math.floor(place / this.size)].getScalarData()[place % this.size] = value;
    }
    this.#redraw();
  }

  /** The value of a voxel. @param {number} place */
  at(place) {
    return this.images[Math.floor(place / this.size)].getScalarData()[place % this.size];
  }

  /** All voxels, image by image in the order of the scan's instances. */
  voxels() {
    const found = new Uint8Array(this.start.length);
    this.images.forEach((image, slice) => found.set(image.getScalarData(), slice * this.size));
    return found;
  }

  /** What was submitted is no change any more. @param {Uint8Array} voxels */
  markKept(voxels) {
    this.start.set(voxels);
    this.#count();
    this.#tell();
  }

  /** How many voxels differ from the start, and in how many slices. */
  get changes() {
    const slices = this.changed.reduce((count, voxels) => count + (voxels > 0 ? 1 : 0), 0);
    return { voxels: this.changed.reduce((sum, voxels) => sum + voxels, 0), slices };
  }

  /** The value that the brush paints. @returns {number | undefined} */
  get active() {
    return window.cornerstoneTools.segmentation.segmentIndex.getActiveSegmentIndex(this.id);
  }

  /** Let the brush paint this label map, and none that was added in OHIF's own panel. */
  takeOver() {
    for (const { viewportId } of viewportsOf(this.services, this.scan)) {
      this.services.segmentationService.setActiveSegmentation(viewportId, this.id);
    }
  }

  /** @param {number} value */
  activate(value) {
    this.takeOver();
    window.cornerstoneTools.segmentation.segmentIndex.setActiveSegmentIndex(this.id, value);
  }

  /** Hide or show a structure. @param {number} value */
  toggle(value) {
    const isShown = this.hidden.delete(value);
    if (!isShown) {
      this.hidden.add(value);
    }
    for (const { viewportId } of viewportsOf(this.services, this.scan)) {
      this.#setVisibility(viewportId, value, isShown);
    }
  }

  undo() {
    this.#step(this.done, this.undone, 'before');
  }

  redo() {
    this.#step(this.undone, this.done, 'after');
  }


  /** Take it out of the viewer. */
  dispose() {
    this.services.segmentationService.remove(this.id);
    window.cornerstone.eventTarget.removeEventListener(MODIFIED, this.onModified);
    for (const type of ['pointerdown', 'pointerup', 'pointercancel']) {
      window.removeEventListener(type, this.onPointer, true);
    }
  }

  /**
   * @param {string} viewportId
   * @param {number} value
   * @param {boolean} isShown
   */
  #setVisibility(viewportId, value, isShown) {
    const specifier = { segmentationId: this.id, type: 'Labelmap' };
    const { visibility } = window.cornerstoneTools.segmentation.config;
    visibility.setSegmentIndexVisibility(viewportId, specifier, value, isShown);
  }

  /** The voxels of each slice, as Cornerstone holds them. */
  #images() {
    const { imageIds, referencedImageIds } =
      this.services.segmentationService.getSegmentation(this.id).representationData.Labelmap;
    /** @type {Map<string, any>} */
    const byInstance = new Map();
    referencedImageIds.forEach((/** @type {string} */ id, /** @type {number} */ i) => {
      byInstance.set(instanceOf(id), window.cornerstone.cache.getImage(imageIds[i]).voxelManager);
    });
    return this.scan.instances.map(instance => {
      const found = byInstance.get(instance);
      if (!found) {
        throw new Error(`the viewer does not have the slice ${instance}`);
      }
      return found;
    });
  }

  /** @param {Uint8Array} voxels */
  #write(voxels) {
    this.images.forEach((image, slice) => {
      image.getScalarData().set(voxels.subarray(slice * this.size, (slice + 1) * this.size));
    });
  }

  /**
   * Show the hidden structures that were put into a slice since the last look, so that it is seen what is painted.
   *
   * @param {number} slice -1 for none
   */
  #reveal(slice) {
    if (!this.hidden.size || slice < 0) {
      return;
    }
    const now = this.images[slice].getScalarData();
    const before = this.seen.subarray(slice * this.size, (slice + 1) * this.size);
    const isPainted = (/** @type {number} */ value) =>
      now.some((/** @type {number} */ voxel, /** @type {number} */ i) => voxel === value && before[i] !== value);
    const painted = [...this.hidden].filter(isPainted);
    if (painted.length) {
      painted.forEach(value => this.toggle(value));
      this.#tell();
    }
  }

  /** Note what was changed since the last look, when no stroke goes on. */
  #look() {
    if (this.isPressed || !this.isTouched) {
      return;
    }
    this.isTouched = false;
    /** @type {Step} */
    const step = [];
    this.images.forEach((image, slice) => {
      const now = image.getScalarData();
      const before = this.seen.subarray(slice * this.size, (slice + 1) * this.size);
      if (!isSame(now, before)) {
        this.#reveal(slice);
        step.push({ slice, before: before.slice(), after: now.slice() });
        before.set(now);
      }
    });
    if (!step.length) {
      return;
    }
    const last = this.done.at(-1);
    if (last && takesBack(step, last)) {
      this.done.pop(); // the viewer's own undo
      this.undone.push(last);
    } else {
      this.done.push(step);
      this.undone = [];
      this.#forgetOldest();
    }
    this.#count(step.map(part => part.slice));
    this.#tell();
  }

  /**
   * @param {Step[]} from
   * @param {Step[]} to
   * @param {'before' | 'after'} side
   */
  #step(from, to, side) {
    const step = from.pop();
    if (!step) {
      return;
    }
    to.push(step);
    for (const part of step) {
      this.images[part.slice].getScalarData().set(part[side]);
      this.seen.set(part[side], part.slice * this.size);
    }
    this.#count(step.map(part => part.slice));
    this.#redraw();
  }

  #forgetOldest() {
    const bytes = (/** @type {Step} */ step) => 2 * step.length * this.size;
    let sum = this.done.reduce((total, step) => total + bytes(step), 0);
    while (sum > MAX_UNDO_BYTES && this.done.length > 1) {
      sum -= bytes(/** @type {Step} */ (this.done.shift()));
    }
  }

  /** @param {Iterable<number>} [slices] those that may have changed; all by default */
  #count(slices = this.changed.keys()) {
    for (const slice of slices) {
      const end = (slice + 1) * this.size;
      let count = 0;
      for (let i = slice * this.size; i < end; i += 1) {
        count += this.seen[i] === this.start[i] ? 0 : 1;
      }
      this.changed[slice] = count;
    }
  }

  #redraw() {
    window.cornerstoneTools.segmentation.triggerSegmentationEvents.triggerSegmentationDataModified(this.id);
    this.#tell();
  }

  #tell() {
    this.dispatchEvent(new Event('change'));
  }
}

/**
 * @param {Uint8Array} one
 * @param {Uint8Array} other
 */
function isSame(one, other) {
  for (let i = 0; i < one.length; i += 1) {
    if (one[i] !== other[i]) {
      return false;
    }
  }
  return true;
}

/**
 * Whether a step is another one backwards.
 *
 * @param {Step} step
 * @param {Step} last
 */
function takesBack(step, last) {
  return (
    step.length === last.length &&
    step.every((part, i) => part.slice === last[i].slice && isSame(part.after, last[i].before))
  );
}
