/**
 * What the panel asks of the server: the routes below `/segqc/viewer`.
 *
 * @typedef {{ low: number, high: number, level: number }} Interval
 * @typedef {{ value: number, name: string, colour: string }} Segment
 * @typedef {{ version: number, tag: string, source: string, by: string | null, is_own: boolean, made_at: string,
 *   made_of: number | null, is_current: boolean, has_voxels: boolean }} Version
 * @typedef {{ is_own: boolean, to: string | null, until: string, slices: string[] | null }} Lease
 * @typedef {{ name: string, values: number[], present: boolean, dice: number | null, interval: Interval | null,
 *   error_ml: number }} StructureEstimate
 * @typedef {{ instance: string, structure: string, columns: [number, number], rows: [number, number],
 *   area_mm2: number, peak_error: number }} Box
 * @typedef {{ instance: string, structure: string, values: number[], columns: [number, number],
 *   rows: [number, number], voxels: number }} BoxToTake
 * @typedef {{ version: number, made_of: number, boxes: BoxToTake[] }} Offer
 * @typedef {{ version: number, dice: number, interval: Interval | null, structures: StructureEstimate[],
 *   slices: { instance: string, error_ml: number }[], worst_slices: string[], boxes: Box[] }} Estimate
 * @typedef {{ scan: string, title: string, study: string, series: string, state: string, reason: string | null,
 *   instances: string[], rows: number, columns: number, voxel_ml: number, segments: Segment[], label: Version | null, lease: Lease | null,
 *   has_networks: boolean, estimate: Estimate | null, warnings: string[], history: Version[] }} Scan
 * @typedef {{ name: string, voxels_changed: number, dice: number | null, is_empty: boolean,
 *   was_empty: boolean }} Difference
 * @typedef {{ voxels_changed: number, slices_changed: number, structures: Difference[], warnings: string[],
 *   conflict: string | null }} Check
 * @typedef {{ state: 'done' | 'running' | 'none', sentence: string, errors?: object[], version?: number }} SubmissionCheck
 * @typedef {{ version: number, tag: string, correction: number | null, check: SubmissionCheck }} Kept
 */

/** The server whose extension this is, with a slash at its end: a hospital's own OHIF loads it from elsewhere. */
export const SERVER = new URL('../../', import.meta.url);

const VIEWER = new URL('segqc/viewer/', SERVER);
const CLIENT = 'segqc-client';

/** A request that the server refuses, in its own words. */
export class Refusal extends Error {
  /**
   * @param {number} status
   * @param {string} sentence
   */
  constructor(status, sentence) {
    super(sentence);
    this.status = status;
  }
}

/** The server does not answer. */
export class NoAnswer extends Error {
  constructor() {
    super('The server does not answer.');
  }
}

/**
 * What this browser calls itself. On the server's own pages a cookie tells; another site's page sends none.
 *
 * @returns {Record<string, string>}
 */
function client() {
  if (SERVER.origin === window.location.origin) {
    return {};
  }
  let own = window.localStorage.getItem(CLIENT);
  if (!own) {
    own = `ohif ${crypto.getRandomValues(new Uint32Array(2)).join('-')}`;
    window.localStorage.setItem(CLIENT, own);
  }
  return { client_id: own };
}

/**
 * @param {string} path below the viewer's routes
 * @param {RequestInit} [options]
 * @param {URL} [base]
 * @returns {Promise<Response>}
 * @throws {Refusal | NoAnswer}
 */
async function ask(path, options, base = VIEWER) {
  const address = new URL(path, base);
  for (const [name, value] of Object.entries(client())) {
    address.searchParams.set(name, value);
  }
  let response;
  try {
    response = await fetch(address, { credentials: 'include', ...options });
  } catch {
    throw new NoAnswer();
  }
  if (!response.ok) {
    const told = await response.json().catch(() => ({}));
    throw new Refusal(response.status, told.detail ?? `The server answers with ${response.status}.`);
  }
  return response;
}

/** @param {object} body */
const json = body => ({
  method: 'POST',
  headers: { 'Content-Type': 'application/json' },
  body: JSON.stringify({ ...body, ...client() }),
});

/** @param {Blob} content */
async function packed(content) {
  const stream = content.stream().pipeThrough(new CompressionStream('gzip'));
  return new Blob([await new Response(stream).arrayBuffer()], { type: 'application/gzip' });
}

/**
 * The scan to correct next; null where none is left.
 *
 * @param {string} [reason] why the one that the annotator has is skipped
 * @returns {Promise<{ scan: Scan | null, note: string | null }>}
 */
export async function nextScan(reason) {
  return (await ask('next', json(reason ? { skip_reason: reason } : {}))).json();
}

/**
 * @param {string} uid of its series, or of its study if that has no other
 * @returns {Promise<Scan>}
 */
export async function readScan(uid) {
  return (await ask(`scans/${uid}`)).json();
}

/**
 * The voxels of a label version, image by image in the order of the scan's instances.
 *
 * @param {Scan} scan
 * @param {number} version
 */
export async function readLabel(scan, version) {
  return new Uint8Array(await (await ask(`scans/${scan.series}/labels/${version}`)).arrayBuffer());
}

/**
 * The error map of a label version: 0 to 255, in the same order.
 *
 * @param {Scan} scan
 * @param {number} version
 */
export async function readErrors(scan, version) {
  return new Uint8Array(await (await ask(`scans/${scan.series}/errors/${version}`)).arrayBuffer());
}

/**
 * What SegQC-Net would change of a label version; its voxels are those of a label version of their own.
 *
 * @param {Scan} scan
 * @param {number} version
 * @returns {Promise<Offer>}
 */
export async function readProposal(scan, version) {
  return (await ask(`scans/${scan.series}/proposals/${version}`)).json();
}

/**
 * @param {Scan} scan
 * @param {Uint8Array} voxels image by image in the order of the scan's instances
 * @param {number | null} startedFrom the version that they were made of
 * @param {object} [more] what else is told
 */
async function form(scan, voxels, startedFrom, more = {}) {
  const data = new FormData();
  const params = { instances: scan.instances, started_from: startedFrom, ...more, ...client() };
  data.append('params', JSON.stringify(params));
  data.append('voxels', await packed(new Blob([/** @type {BlobPart} */ (voxels)])), 'voxels.gz');
  return { method: 'POST', body: data };
}

/**
 * What a label map would change, and whether it would be refused.
 *
 * @param {Scan} scan
 * @param {Uint8Array} voxels
 * @param {number | null} startedFrom
 * @returns {Promise<Check>}
 */
export async function checkLabel(scan, voxels, startedFrom) {
  return (await ask(`scans/${scan.series}/check`, await form(scan, voxels, startedFrom))).json();
}

/**
 * Submit a label map.
 *
 * @param {Scan} scan
 * @param {Uint8Array} voxels
 * @param {number | null} startedFrom
 * @param {boolean} beside whether to keep them beside the final label
 * @param {{ version: number, boxes: number } | null} proposal what was taken of a proposal, where one was offered
 * @returns {Promise<Kept>}
 * @throws {Refusal} with 409 where another label took the place of the one that it was made of
 */
export async function submitLabel(scan, voxels, startedFrom, beside, proposal) {
  return (await ask(`scans/${scan.series}/label`, await form(scan, voxels, startedFrom, { beside, proposal }))).json();
}

/**
 * How it is with the check of a submitted version, after a second or two at most.
 *
 * @param {Scan} scan
 * @param {number} version
 * @returns {Promise<SubmissionCheck>}
 */
export async function readCheck(scan, version) {
  return (await ask(`segqc/labels/${encodeURIComponent(scan.scan)}/check?version=${version}`, {}, SERVER)).json();
}

/**
 * Make an earlier version the current one of its tag again.
 *
 * @param {Scan} scan
 * @param {number} version
 */
export async function restoreLabel(scan, version) {
  const path = `segqc/labels/${encodeURIComponent(scan.scan)}/restore?version=${version}`;
  await ask(path, { method: 'POST' }, SERVER);
}
