/** What OHIF puts into the window. */
interface Window {
  cornerstone: any;
  cornerstoneTools: any;
}
