/**
 * The work on one scan after the other: what is shown, what was changed, and what became of it. No page is drawn here.
 *
 * @typedef {import('./server.js').Scan} Scan
 * @typedef {import('./server.js').Check} Check
 * @typedef {import('./server.js').Kept} Kept
 * @typedef {import('./proposal.js').ProposedBox} ProposedBox
 *
 * @typedef {'loading' | 'ready' | 'none-left' | 'unknown' | 'failed'} Phase
 * @typedef {{ kind: 'kept' | 'note' | 'problem' | 'warning', text: string }} Notice
 * @typedef {{ voxels: Uint8Array, startedFrom: number | null, taken: number[] }} Draft what was taken of a proposal, by
 *   the boxes' numbers
 */
import { mendBrushes } from './brush.js';
import { Mask } from './mask.js';
import {
  currentInstance, goTo, isStack, jumpTo, setBrushSize, shown, scanOfAddress, takeTool, toolInHand, viewportsOf,
} from './ohif.js';
import { Overlay } from './overlay.js';
import { Proposal } from './proposal.js';
import * as server from './server.js';

const LOOK_AGAIN_MS = 30_000;
const HOLD_MS = 8_000;
const PREFERENCES = 'segqc-panel';
export const ID = 'segqc';
/** The panel's name in OHIF. */
export const PANEL = `${ID}.panelModule.${ID}`;

/** Unsubmitted label maps of scans that were left, as long as the page is open. @type {Map<string, Draft>} */
const drafts = new Map();

export class Session extends EventTarget {
  constructor() {
    super();
    /** @type {any} */
    this.services = null;
    /** @type {any} */
    this.commandsManager = null;
    /** @type {Phase} */
    this.phase = 'loading';
    /** @type {Scan | null} */
    this.scan = null;
    /** @type {Mask | null} */
    this.mask = null;
    /** @type {Overlay | null} */
    this.overlay = null;
    /** the label version that the mask was made of @type {number | null} */
    this.startedFrom = null;
    /** @type {Notice | null} */
    this.notice = null;
    /** why a submission was refused, until it is settled @type {string | null} */
    this.conflict = null;
    /** what would be submitted @type {Check | null} */
    this.check = null;
    /** what SegQC-Net says of what was submitted @type {import('./server.js').SubmissionCheck | null} */
    this.submitted = null;
    /** what SegQC-Net would change of the label that the mask was made of @type {Proposal | null} */
    this.proposal = null;
    /** whether a draft of the scan is there @type {Draft | null} */
    this.draft = null;
    /** what is being done, in a word or two; empty while nothing is */
    this.busy = '';
    this.errorMap = /** @type {'none' | 'loading' | 'there' | string} */ ('none');
    this.preferences = { boxes: true, proposal: true, map: true, opacity: 0.5, brush: 4, ...preferences() };
    /** what a draft has of a proposal that is not there yet @type {number[]} */
    this.takenBefore = [];
    /** a scan that was just read, before OHIF shows it @type {Scan | undefined} */
    this.known = undefined;
    /** what the server says of it @type {string | null} */
    this.noteOfNext = null;
    /** why no scan was handed out */
    this.noneLeft = '';
    /** what was found in a scan that was left @type {string | null} */
    this.elsewhere = null;
    /** whether the next scan was asked for, and none is being opened yet */
    this.isGoingOn = false;
    /** aborted when the annotator chooses a slice @type {AbortController | null} */
    this.holding = null;
    /** counts what was opened: an answer that comes after the next scan was opened is nobody's */
    this.number = 0;
    /** @type {(() => void)[]} */
    this.ends = [];
  }

  /**
   * Begin with the scan that the address names: OHIF enters the mode.
   *
   * @param {any} servicesManager
   * @param {any} commandsManager
   */
  enter(servicesManager, commandsManager) {
    this.leave();
    this.services = servicesManager.services;
    this.commandsManager = commandsManager;
    const { viewportGridService: grid, cornerstoneViewportService: viewports } = this.services;
    const again = () => this.#showAgain();
    for (const [service, event] of [
      [grid, grid.EVENTS.GRID_STATE_CHANGED],
      [grid, grid.EVENTS.ACTIVE_VIEWPORT_ID_CHANGED],
      [viewports, viewports.EVENTS.VIEWPORT_DATA_CHANGED],
    ]) {
      const { unsubscribe } = service.subscribe(event, again);
      this.ends.push(unsubscribe);
    }
    const timer = setInterval(() => document.visibilityState === 'visible' && this.#lookAgain(), LOOK_AGAIN_MS);
    const keep = (/** @type {BeforeUnloadEvent} */ event) => this.isChanged && event.preventDefault();
    window.addEventListener('beforeunload', keep);
    this.ends.push(
      () => clearInterval(timer),
      () => window.removeEventListener('beforeunload', keep)
    );
    this.#open(scanOfAddress());
  }

  /** OHIF leaves the mode: what was not submitted is kept until the page is closed. */
  leave() {
    this.#putAside();
    this.number += 1;
    this.ends.forEach(end => end());
    this.ends = [];
  }

  get isChanged() {
    return (this.mask?.changes.voxels ?? 0) > 0;
  }

  /** Whether the annotator has the scan and has not submitted it. */
  get isHandedOut() {
    return this.scan?.lease?.is_own ?? false;
  }

  /** Whether another label counts by now than the one that the mask was made of. */
  get hasMovedOn() {
    return this.phase === 'ready' && this.scan !== null && (this.scan.label?.version ?? null) !== this.startedFrom;
  }

  get isReconstructed() {
    const { scan } = this;
    return scan !== null && this.mask !== null && viewportsOf(this.services, scan).some(v => !isStack(v.viewport));
  }

  get instance() {
    return this.scan && this.services ? currentInstance(this.services, this.scan) : null;
  }

  // ------------------------------------------------------------------------------------------------------------ scans

  /**
   * Go on to the next scan.
   *
   * @param {string} [reason] why the one that the annotator has is skipped
   */
  async next(reason) {
    await this.#do('Looking for the next scan', async () => {
      this.isGoingOn = true;
      const { scan, note } = await server.nextScan(reason);
      this.#forget();
      if (!scan) {
        this.#putAside();
        this.phase = 'none-left';
        this.scan = null;
        this.noneLeft = note ?? '';
        return;
      }
      this.noteOfNext = scan.has_networks ? note : null; // without networks the panel has a word of its own
      if (scan.series === scanOfAddress() || viewportsOf(this.services, scan).length) {
        await this.#open(scan.series, scan);
      } else {
        this.known = scan;
        goTo(this.commandsManager, scan);
      }
    });
  }

  /** Read the label that counts now, in the place of what is shown; changes are lost. */
  async reload() {
    if (this.scan) {
      this.#forget();
      await this.#open(this.scan.series);
    }
  }

  /**
   * @param {string} uid of its series, or of its study
   * @param {Scan} [known] if it was just read
   */
  async #open(uid, known = this.known) {
    this.#putAside();
    this.known = undefined;
    const number = (this.number += 1);
    const isOver = () => number !== this.number;
    this.isGoingOn = false;
    this.takenBefore = [];
    Object.assign(this, { phase: 'loading', scan: null, conflict: null, check: null, draft: null, busy: '' });
    this.submitted = this.proposal = null;
    this.notice = this.noteOfNext ? { kind: 'note', text: this.noteOfNext } : null;
    this.noteOfNext = null;
    this.errorMap = 'none';
    this.#tell();
    try {
      const scan = known && [known.series, known.study].includes(uid) ? known : await server.readScan(uid);
      if (isOver()) {
        return;
      }
      this.scan = scan;
      this.startedFrom = scan.label?.version ?? null;
      const [voxels, displaySet] = await Promise.all([
        scan.label ? server.readLabel(scan, scan.label.version) : null,
        shown(this.services, scan, isOver),
      ]);
      if (isOver()) {
        return;
      }
      // before there is a mask: OHIF 3.10 does not draw one that has just been added on another slice
      const [first] = scan.lease?.slices ?? scan.estimate?.worst_slices ?? middleOf(scan, voxels);
      if (first) {
        await jumpTo(this.services, scan, first);
      }
      const mask = await Mask.create(this.services, displaySet, scan, voxels);
      if (isOver()) {
        mask.dispose();
        return;
      }
      this.mask = mask;
      mask.addEventListener('change', () => {
        this.#showProposal();
        this.#tell();
      });
      this.overlay = new Overlay(this.services, scan);
      this.#prefer();
      await mask.show();
      this.overlay.show();
      this.services.panelService.activatePanel(PANEL, true); // newer OHIFs have just shown their own
      this.draft = drafts.get(scan.series) ?? null;
      this.phase = 'ready';
      this.#tell();
      void this.showErrorMap().then(() => this.#propose(number)); // nothing waits for it
      if (first) {
        void this.#hold(first, isOver);
      }
    } catch (error) {
      if (isOver()) {
        return;
      }
      const isUnknown = error instanceof server.Refusal && error.status === 404;
      this.phase = isUnknown ? 'unknown' : 'failed';
      this.#complain(error);
    }
  }

  /**
   * Stay at a slice for the first seconds, until the annotator does something: OHIF may set a viewport up twice, and
   * begins at the first slice each time.
   *
   * @param {string} instance
   * @param {() => boolean} isOver
   */
  async #hold(instance, isOver) {
    const end = performance.now() + HOLD_MS;
    const inputs = ['pointerdown', 'wheel', 'keydown'];
    const released = (this.holding = new AbortController());
    inputs.forEach(type =>
      window.addEventListener(type, () => released.abort(), { capture: true, signal: released.signal })
    );
    while (!released.signal.aborted && !isOver() && performance.now() < end) {
      if (this.scan && this.instance !== instance) {
        await jumpTo(this.services, this.scan, instance);
      }
      await new Promise(resolve => setTimeout(resolve, HOLD_MS / 40));
    }
    released.abort();
  }

  /** Leave the scan; what was not submitted is kept. */
  #putAside() {
    if (this.scan && this.mask && this.isChanged) {
      const { scan, mask, startedFrom, proposal } = this;
      const taken = proposal?.taken(mask).map(box => proposal.boxes.indexOf(box)) ?? [];
      drafts.set(scan.series, { voxels: mask.voxels(), startedFrom, taken });
    }
    this.mask?.dispose();
    this.overlay?.dispose();
    this.mask = this.overlay = null;
  }

  /** What is not submitted is not wanted any more. */
  #forget() {
    if (this.scan && this.mask) {
      drafts.delete(this.scan.series);
      this.mask.markKept(this.mask.voxels());
    }
  }

  /** Go on with what was left unsubmitted, or not. @param {boolean} isWanted */
  settleDraft(isWanted) {
    if (this.draft && this.mask && this.scan) {
      if (isWanted) {
        this.startedFrom = this.draft.startedFrom;
        this.mask.replace(this.draft.voxels);
        this.takenBefore = this.draft.taken;
        this.#pressAgain();
      }
      drafts.delete(this.scan.series);
    }
    this.draft = null;
    this.#tell();
  }

  // ------------------------------------------------------------------------------------------------------- submission

  /** Ask the server what would be submitted. */
  async review() {
    const { scan, mask } = this;
    if (scan && mask) {
      await this.#do('Checking', async () => {
        this.check = await server.checkLabel(scan, mask.voxels(), this.startedFrom);
        this.conflict = this.check.conflict;
        if (this.conflict) {
          await this.#read();
        }
      });
    }
  }

  cancelReview() {
    Object.assign(this, { check: null, conflict: null });
    this.#tell();
  }

  /** Submit. @param {boolean} [beside] beside the label that counts, whatever that is by now */
  async submit(beside = false) {
    const { scan, mask } = this;
    if (!scan || !mask) {
      return;
    }
    await this.#do('Submitting', async () => {
      const voxels = mask.voxels();
      try {
        const kept = await server.submitLabel(scan, voxels, this.startedFrom, beside, this.#taken());
        mask.markKept(voxels);
        this.proposal = null; // of a label that is not the one to go on from any more
        this.#showProposal();
        drafts.delete(scan.series);
        Object.assign(this, { check: null, conflict: null });
        const place = beside ? ` beside the final label, as ${kept.tag}` : '';
        this.notice = { kind: 'kept', text: `Version ${kept.version} kept${place}.` };
        this.startedFrom = kept.version;
        this.submitted = kept.check;
        await this.#read();
        void this.#followCheck(scan, kept);
      } catch (error) {
        if (error instanceof server.Refusal && error.status === 409) {
          this.conflict = error.message;
          await this.#read();
        } else if (error instanceof server.NoAnswer) {
          this.notice = {
            kind: 'problem',
            text: 'The server does not answer. Your changes are kept in this tab: submit again in a while.',
          };
        } else {
          throw error;
        }
      }
    });
  }

  /**
   * Wait for the check of a submission, and show what it says; of a scan that was left meanwhile, only what was found.
   *
   * @param {Scan} scan
   * @param {import('./server.js').Kept} kept
   */
  async #followCheck(scan, kept) {
    const { number } = this;
    let { check } = kept;
    try {
      while (check.state === 'running') {
        check = await server.readCheck(scan, kept.version);
      }
    } catch {
      check = { state: 'none', sentence: '' }; // the label is kept; nothing else was promised
    }
    const isLeft = number !== this.number;
    if ((isLeft || this.isGoingOn) && check.errors?.length) {
      this.elsewhere = `${scan.title}, version ${kept.version}: ${check.sentence}`;
      this.#tell();
    }
    if (isLeft) {
      return;
    }
    this.submitted = check;
    if (check.state === 'done' && this.startedFrom === kept.version && !this.hasMovedOn) {
      await this.#estimateAgain().catch(() => undefined);
    }
    this.#tell();
  }

  /** Show the estimate and the boxes of the label that was submitted, in the place of those of the mask before. */
  async #estimateAgain() {
    const { number } = this;
    const now = this.scan && (await server.readScan(this.scan.series));
    if (now && number === this.number && this.overlay) {
      this.scan = now;
      this.overlay.dispose();
      this.overlay = new Overlay(this.services, now);
      this.errorMap = 'none';
      this.#prefer();
      this.overlay.show();
      void this.showErrorMap().then(() => this.#propose(number));
    }
  }

  /** Whether the label that is shown was checked, and is to be looked at again in the slices with a box. */
  get isToLookAgain() {
    const { submitted, scan } = this;
    return Boolean(submitted?.errors?.length) && scan?.estimate?.version === submitted?.version;
  }

  // --------------------------------------------------------------------------------------------------------- proposal

  /**
   * Ask what SegQC-Net would change of a label that it has judged, where the mask was made of that label.
   *
   * @param {number} number of what was opened
   */
  async #propose(number) {
    const { scan, overlay, startedFrom } = this;
    if (number !== this.number || !scan || !overlay || startedFrom === null || scan.estimate?.version !== startedFrom) {
      return;
    }
    try {
      const offer = await server.readProposal(scan, startedFrom);
      const [before, after] = await Promise.all([startedFrom, offer.version].map(v => server.readLabel(scan, v)));
      if (number !== this.number || startedFrom !== this.startedFrom) {
        return;
      }
      this.proposal = new Proposal(scan, offer, before, after);
      this.#pressAgain();
      this.#showProposal();
      this.#tell();
    } catch {
      // there is none; the mask can be corrected without
    }
  }

  /** Take a box of the proposal, or all that are left, in one step that can be undone. @param {ProposedBox} [box] */
  takeBox(box) {
    const { proposal, mask } = this;
    if (proposal && mask) {
      proposal.take(mask, box ? [box] : proposal.open(mask));
    }
  }

  /** Look at a box of the proposal; `N` and `P` go on from it. @param {ProposedBox} box */
  async choose(box) {
    if (this.proposal) {
      await this.jump(box.instance);
      this.proposal.chosen = box;
      this.#showProposal();
      this.#tell();
    }
  }

  /** How many boxes of the proposal the mask has. */
  get boxesTaken() {
    return this.mask ? (this.proposal?.taken(this.mask).length ?? 0) : 0;
  }

  #taken() {
    const { proposal } = this;
    return proposal && proposal.madeOf === this.startedFrom ? { version: proposal.version, boxes: this.boxesTaken } : null;
  }

  /** Boxes that were taken before the scan was left count as taken again. */
  #pressAgain() {
    const { proposal } = this;
    if (proposal) {
      this.takenBefore.forEach(index => proposal.boxes[index] && proposal.pressed.add(proposal.boxes[index]));
      this.takenBefore = [];
    }
  }

  #showProposal() {
    const { overlay, mask, proposal } = this;
    if (overlay && mask) {
      overlay.proposed = this.preferences.proposal && proposal ? proposal.open(mask) : [];
      overlay.chosen = proposal?.chosen ?? null;
      overlay.draw();
    }
  }

  // ---------------------------------------------------------------------------------------------------------- history

  /** Show an older version in the place of the mask, as a change that is to be submitted. @param {number} version */
  async load(version) {
    const { scan, mask } = this;
    if (scan && mask) {
      await this.#do(`Loading version ${version}`, async () => {
        mask.replace(await server.readLabel(scan, version));
        this.notice = { kind: 'note', text: `Version ${version} is shown. Submit it to keep it, or undo.` };
      });
    }
  }

  /** Make an older version the label that counts again. @param {number} version */
  async restore(version) {
    const { scan } = this;
    if (scan) {
      await this.#do(`Restoring version ${version}`, async () => {
        await server.restoreLabel(scan, version);
        await this.reload();
        this.notice = { kind: 'kept', text: `Version ${version} counts again, as version ${this.startedFrom}.` };
      });
    }
  }

  // ------------------------------------------------------------------------------------------------------------- view

  /** The value that the brush paints; undefined where there is none. @returns {number | undefined} */
  get activeValue() {
    return this.mask?.active;
  }

  /** Paint a structure from now on, which is shown, so that it is seen what is painted. @param {number} value */
  activate(value) {
    this.mask?.activate(value);
    if (this.hiddenValues.has(value)) {
      this.toggle(value);
    }
    if (!toolInHand(this.services)) {
      this.take('brush');
    }
    this.#tell();
  }

  /** The values that are hidden. */
  get hiddenValues() {
    return this.mask?.hidden ?? new Set();
  }

  /** Hide or show a structure. @param {number} value */
  toggle(value) {
    this.mask?.toggle(value);
    this.#tell();
  }

  /** @param {'brush' | 'eraser'} tool */
  take(tool) {
    this.mask?.takeOver();
    takeTool(this.services, this.commandsManager, tool);
    this.#prefer();
    this.#tell();
  }

  /** Show a slice. @param {string} instance */
  async jump(instance) {
    this.holding?.abort();
    if (this.scan && this.mask) {
      if (this.proposal?.chosen) {
        this.proposal.chosen = null;
        this.#showProposal();
      }
      await jumpTo(this.services, this.scan, instance);
      this.#tell();
    }
  }

  /**
   * Go on to the next box of the proposal where one is looked at, else to the next worst slice; or back.
   *
   * @param {1 | -1} step
   */
  async goOn(step) {
    const { chosen, boxes } = this.proposal ?? {};
    if (chosen && boxes) {
      await this.choose(boxes[Math.min(boxes.length - 1, Math.max(0, boxes.indexOf(chosen) + step))]);
    } else {
      await this.jumpByRank(step);
    }
  }

  /** Go on to the next worst slice, or back to the one before. @param {1 | -1} step */
  async jumpByRank(step) {
    const ranked = this.ranked;
    if (!ranked.length) {
      return;
    }
    const now = ranked.indexOf(this.instance ?? '');
    const wanted = now < 0 ? 0 : Math.min(ranked.length - 1, Math.max(0, now + step));
    await this.jump(ranked[wanted]);
  }

  /**
   * The slices with the most likely errors first, those that are asked for where not all are; after a submission that is
   * to be looked at again, those with a box alone.
   */
  get ranked() {
    const { estimate, lease } = this.scan ?? {};
    const boxed = this.isToLookAgain && new Set(estimate?.boxes.map(box => box.instance));
    const slices = [...(estimate?.slices ?? [])].sort((one, other) => other.error_ml - one.error_ml);
    return slices
      .map(slice => slice.instance)
      .filter(instance => (!lease?.slices || lease.slices.includes(instance)) && (!boxed || boxed.has(instance)));
  }

  /** @param {Partial<Session['preferences']>} wanted */
  prefer(wanted) {
    Object.assign(this.preferences, wanted);
    window.localStorage.setItem(PREFERENCES, JSON.stringify(this.preferences));
    this.#prefer();
    this.#tell();
    if (this.preferences.map) {
      this.showErrorMap();
    }
  }

  /** Compute and show the error map, where it is wanted and not there yet. */
  async showErrorMap() {
    const { scan, overlay, number } = this;
    const version = scan?.estimate?.version;
    if (!scan || !overlay || version === undefined || !this.preferences.map || this.errorMap !== 'none') {
      return;
    }
    this.errorMap = 'loading';
    this.#tell();
    try {
      overlay.errors = await server.readErrors(scan, version);
      this.errorMap = 'there';
    } catch (error) {
      this.errorMap = error instanceof Error ? error.message : String(error);
    }
    if (number === this.number) {
      overlay.draw();
      this.#tell();
    }
  }

  #prefer() {
    if (this.overlay) {
      this.overlay.hasBoxes = this.preferences.boxes;
      this.overlay.opacity = this.preferences.map ? this.preferences.opacity : 0;
      this.#showProposal();
      mendBrushes(this.services);
      setBrushSize(this.services, this.preferences.brush);
    }
  }

  async #showAgain() {
    await this.mask?.show();
    this.overlay?.show();
    this.#tell();
  }

  /** See what has become of the scan meanwhile. */
  async #lookAgain() {
    if (this.phase === 'ready' && !this.busy) {
      await this.#read().catch(() => undefined); // it is told when something is asked for
    }
  }

  async #read() {
    const { scan, number } = this;
    if (scan) {
      const now = await server.readScan(scan.series);
      if (number === this.number) {
        this.scan = { ...now, estimate: scan.estimate, warnings: scan.warnings };
        this.#tell();
      }
    }
  }

  /**
   * @param {string} what
   * @param {() => Promise<void>} work
   */
  async #do(what, work) {
    if (this.busy) {
      return;
    }
    this.busy = what;
    this.notice = this.elsewhere = null;
    this.#tell();
    try {
      await work();
    } catch (error) {
      this.isGoingOn = false;
      this.#complain(error);
    } finally {
      this.busy = '';
      this.#tell();
    }
  }

  /** @param {unknown} error */
  #complain(error) {
    this.notice = { kind: 'problem', text: error instanceof Error ? error.message : String(error) };
    this.#tell();
  }

  #tell() {
    this.dispatchEvent(new Event('change'));
  }
}

/**
 * The middle one of the slices that a label map marks; none where it marks nothing.
 *
 * @param {Scan} scan
 * @param {Uint8Array | null} voxels
 */
function middleOf(scan, voxels) {
  const size = scan.rows * scan.columns;
  const isMarked = (/** @type {number} */ i) => voxels?.subarray(i * size, (i + 1) * size).some(value => value > 0);
  const marked = scan.instances.filter((_, i) => isMarked(i));
  return marked.slice(marked.length >> 1, (marked.length >> 1) + 1);
}

function preferences() {
  try {
    return JSON.parse(window.localStorage.getItem(PREFERENCES) ?? '{}');
  } catch {
    return {};
  }
}
